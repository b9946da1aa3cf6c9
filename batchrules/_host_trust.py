"""Which vectorised functions have shown that they handle a batch. One `Trust` for each host call and its endpoints."""

from __future__ import annotations

import threading
from collections.abc import Hashable

_FIRST_RECHECK = 100


class Trust:
    """What is known of each vectorised function, by element shape; shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[Hashable, int] = {}
        self._distrusted: set[Hashable] = set()

    def must_check(self, key: Hashable) -> bool:
        """Count a call, and say whether it has to be checked: until one has passed, and now and then after that."""
        with self._lock:
            calls = self._calls.get(key)
            if calls is None:
                return True
            self._calls[key] = calls + 1
        return _is_recheck(calls + 1)

    def passed(self, key: Hashable) -> None:
        """Note that a check has passed."""
        with self._lock:
            self._calls.setdefault(key, 0)

    def distrust(self, site: Hashable) -> bool:
        """Note that a site is to be called one by one from now on; False if that was known."""
        with self._lock:
            known = site in self._distrusted
            self._distrusted.add(site)
        return not known

    def distrusts(self, site: Hashable) -> bool:
        """Whether a site is to be called one by one."""
        return bool(self._distrusted) and site in self._distrusted


def _is_recheck(calls: int) -> bool:
    """Every power of ten from 100 on: an error that depends on the data is found, and the price goes to nothing."""
    while calls > _FIRST_RECHECK and calls % 10 == 0:
        calls //= 10
    return calls == _FIRST_RECHECK
