"""Which vectorised functions have shown that they handle a batch. One `Trust` for each host call and its endpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

_FIRST_RECHECK = 100


@dataclass
class _Record:
    """What is known of a function that has passed: the calls since then, and the arguments that never varied."""

    calls: int
    unvaried: frozenset[int]


class Trust:
    """What is known of each vectorised function, by element shape; shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[Hashable, _Record] = {}
        self._distrusted: set[Hashable] = set()

    def due(self, key: Hashable, varies: Callable[[int], bool]) -> int | None:
        """Count a call; None if it need not be checked, else the number of calls since the first that passed.

        Calls are checked until one has passed, now and then after that, and when an argument varies that never did in a
        check.
        """
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return 0
            record.calls += 1
            calls, unvaried = record.calls, record.unvaried
        return calls if _is_recheck(calls) or any(varies(argument) for argument in unvaried) else None

    def passed(self, key: Hashable, unvaried: frozenset[int]) -> None:
        """Note that a check has passed in which these mapped arguments did not vary."""
        with self._lock:
            record = self._records.setdefault(key, _Record(0, unvaried))
            record.unvaried &= unvaried

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
