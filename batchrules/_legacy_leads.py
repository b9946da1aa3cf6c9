"""Keep `legacy_vectorized` honest under nested vmaps of a registered primitive."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator

from batchrules._errors import BatchContractError


class _LegacyLeads(threading.local):
    """Which operands the binds around this one gave a leading dimension under `legacy_vectorized`.

    A bind inside several vmaps is batched by one rule inside the other. With `legacy_vectorized` an operand that only
    an outer vmap maps would lead with the outer size where the others lead with the inner one.
    """

    def __init__(self) -> None:
        self._led: tuple[bool, ...] | None = None

    @contextlib.contextmanager
    def of(self, led: tuple[bool, ...]) -> Iterator[None]:
        """While a bind runs in which only these operands lead."""
        before = self._led
        self._led = led if before is None else tuple(map(operator.or_, led, before))
        try:
            yield
        finally:
            self._led = before

    def check(self, in_batched: tuple[bool, ...], where: str) -> None:
        """Raise if an operand is mapped now that did not lead before, beside one that did."""
        if self._led is None or not any(now and not led for now, led in zip(in_batched, self._led, strict=True)):
            return
        raise BatchContractError(
            f"{where}: under 'legacy_vectorized' unmapped operands get no leading dimension, so nested vmaps over "
            "different operands would line up the wrong dimensions. Use 'expand_dims' or 'broadcast_all'."
        )


legacy_leads = _LegacyLeads()
