"""The value gate: two elements of a batch that differ, called on their own, must give what the batch gave for them.

Two, because one would let through what only the first or the last element shows (a maximum over the batch); that
differ, because equal elements prove nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules import _host_results
from batchrules._errors import BatchContractError
from batchrules._failures import message_of
from batchrules._host_site import HostSite
from batchrules._methods import Lead

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """A vectorised call: what it was given, what each argument leads with, and what it gave."""

    method: str
    size: int
    arrays: Sequence[Array]
    leads: Sequence[Lead]
    outputs: Sequence[Array]

    def element(self, row: int) -> list[Array]:
        """The arguments of one element, as the function is given them on its own."""
        return [_element(array, lead, row) for array, lead in zip(self.arrays, self.leads, strict=True)]


def differing_rows(batch: Batch) -> tuple[int, int] | None:
    """The first row and the last that differs from it, in bits (NaN is equal to itself here); None if all are equal."""
    mapped = [a for a, lead in zip(batch.arrays, batch.leads, strict=True) if lead is Lead.BATCH and a.strides[0]]
    ends = [_bytes_by_row(array[[0, -1]]) for array in mapped]
    if any((two[0] != two[1]).any() for two in ends):
        return 0, batch.size - 1
    differs = np.zeros(batch.size, np.bool_)
    for rows in map(_bytes_by_row, mapped):
        differs |= (rows != rows[0]).any(axis=1)
    places = np.flatnonzero(differs)
    return (0, int(places[-1])) if places.size else None


def _element(array: Array, lead: Lead, row: int) -> Array:
    if lead is Lead.NOTHING:
        return array
    return array[row if lead is Lead.BATCH else 0, ...]


def _bytes_by_row(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


def failed_alone(site: HostSite, batch: Batch, row: int, error: BaseException) -> BatchContractError:
    """The error for an element that failed on its own after the batch had succeeded."""
    return BatchContractError(
        f"{site.name} failed{_where(batch, row)}: {type(error).__name__}: {message_of(error)}. A host function must "
        "take one element too, without a leading dimension: that is what it is given where nothing is mapped. Make it "
        "do so, or pass verify=False to go without the check. (If it fails now and then, this may be such a time.)"
    )


def _where(batch: Batch, row: int) -> str:
    return f" when element {row} of a batch of {batch.size} was called on its own to check the batch"


def check(site: HostSite, batch: Batch, row: int, values: Sequence[Any]) -> None:
    """Raise if what an element gave on its own is not what the batch gave for it."""
    for output, value in enumerate(values):
        promised = site.results[output]
        wanted = np.zeros(promised.shape, promised.dtype)
        if value is not None:
            where = f"{_where(batch, row)} (verify=False goes without)"
            wanted = _host_results.as_array(site, output, value, where)
            _host_results.check_element(site, output, wanted, where)
        got = batch.outputs[output][row]
        if not _close(got, wanted, site.conduct.verify):
            raise _broken(site, batch, (row, output), (got, wanted))


def _close(got: Array, wanted: Array, verify: float) -> bool:
    if not jnp.issubdtype(got.dtype, np.inexact):
        return bool(np.array_equal(got, wanted))
    rtol = _tolerance(got.dtype) if verify is True else verify
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    a, b = got.astype(wide), wanted.astype(wide)
    finite = np.abs(b[np.isfinite(b)])
    # Relative to the largest number of the output, since small ones are often differences of large ones.
    return bool(np.allclose(a, b, rtol, rtol * float(finite.max(initial=0.0)), equal_nan=True))


def _tolerance(dtype: np.dtype[Any]) -> float:
    return 1e-6 if jnp.finfo(dtype).bits >= 64 else 1e-3 if jnp.finfo(dtype).bits == 32 else 2e-2


def _broken(site: HostSite, batch: Batch, place: tuple[int, int], values: tuple[Array, Array]) -> BatchContractError:
    row, output = place
    got, wanted = values
    path = site.results[output].path
    with np.errstate(all="ignore"):
        inexact = jnp.issubdtype(got.dtype, np.inexact)
        worst = float(np.nanmax(np.abs(got - wanted), initial=0.0)) if inexact else int(np.sum(got != wanted))
    difference = f"differs by up to {worst:.3g}" if inexact else f"differs in {worst} places"
    shapes = _host_results.described(site, [array.shape for array in batch.arrays])
    return BatchContractError(
        f"{site.name} does not treat the elements of a batch one by one: it was given {batch.size} elements at once "
        f"(method {batch.method!r}, arguments {shapes}), and {f'output {path!r}' if path else 'the result'} of element "
        f"{row} {difference} from what that element gives on its own. Make the function handle a leading dimension "
        "(reductions over the other axes only, arguments lined up with [:, None]), or use method='sequential'. "
        "verify=False turns the check off, which a function with random results needs; verify=1e-2 makes it wider."
    )
