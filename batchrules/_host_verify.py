"""The value gate: two elements of a batch that differ, called on their own, must give what the batch gave for them.

Two, because one would let through what only the first or the last element shows (a maximum over the batch); that
differ, because equal elements prove nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules import _host_results, _precision
from batchrules._errors import BatchContractError
from batchrules._failures import message_of
from batchrules._host_site import HostSite
from batchrules._methods import Lead

Array = np.ndarray[Any, Any]

_NOISE = 1e3  # in units of the last place
_MOST_NOISE = 1e-3  # for 16-bit numbers, whose last place is large
_SPREAD = 0x9E3779B1  # 2**32 by the golden ratio: its multiples spread evenly, whatever the numbers
_WAYS_OUT = (
    "Make the function handle a leading dimension (reductions over the other axes only, arguments lined up with "
    "[:, None]), or use method='sequential'. verify=False turns the check off, which a function with random results "
    "needs; verify=1e-2 makes it wider."
)


@dataclass(frozen=True)
class Batch:
    """A vectorised call: what it was given, what each argument leads with, and what it gave in some rows."""

    method: str
    size: int
    arrays: Sequence[Array]
    leads: Sequence[Lead]
    outputs: Mapping[int, Sequence[Array]]

    def element(self, row: int) -> list[Array]:
        """The arguments of one element, as the function is given them on its own."""
        return [_element(array, lead, row) for array, lead in zip(self.arrays, self.leads, strict=True)]

    def moving(self, row: int) -> list[Array]:
        """The arguments of one element that lead with the batch and are no counters, flags or seeds."""
        led = zip(self.element(row), self.leads, strict=True)
        return [array for array, lead in led if lead is Lead.BATCH and jnp.issubdtype(array.dtype, np.inexact)]

    def varies(self, argument: int, rows: Sequence[int]) -> bool:
        """Whether an argument is not the same in all of these rows."""
        return any(differs(self.arrays[argument], rows[0], row) for row in rows[1:])


def differs(array: Array, row: int, other: int) -> bool:
    """Whether two rows differ, in bits."""
    return array[row].tobytes() != array[other].tobytes()


def first_row(size: int, calls: int) -> int:
    """The row that a check starts from: the first; after so many calls one in the middle, another each time."""
    if calls == 0 or size < 3:
        return 0
    return 1 + (calls * _SPREAD % 2**32) * (size - 2) // 2**32


def differing_rows(batch: Batch, first: int = 0) -> tuple[int, ...] | None:
    """Rows that differ in every argument that varies: mostly two; a third where no two do. None if all are equal.

    They differ in bits, so that NaN is equal to itself. `first` is one of them.
    """
    mapped = [a for a, lead in zip(batch.arrays, batch.leads, strict=True) if lead is Lead.BATCH and a.strides[0]]
    ends = [_bytes_by_row(array[[first, -1]]) for array in mapped]
    if ends and all((two[0] != two[1]).any() for two in ends):
        return first, batch.size - 1
    differs = [(rows != rows[first]).any(axis=1) for rows in map(_bytes_by_row, mapped)]
    varying = np.array([row_differs for row_differs in differs if row_differs.any()], np.bool_)
    if not varying.size:
        return None
    best = batch.size - 1 - int(varying.sum(0)[::-1].argmax())
    unseen = varying[~varying[:, best]]
    others = [batch.size - 1 - int(unseen.sum(0)[::-1].argmax())] if unseen.size else []
    return (first, best, *others)


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
    wanted = [_alone(site, batch, row, output, value) for output, value in enumerate(values)]
    # What cancels leaves noise of the size of what it came from, such as the residual beside a solution.
    noise = _largest([*batch.moving(row), *wanted])
    for output, array in enumerate(wanted):
        got = batch.outputs[row][output]
        if not _close(got, array, site.conduct.verify, noise):
            raise _broken(site, batch, (row, output), (got, array))


def _alone(site: HostSite, batch: Batch, row: int, output: int, value: Any) -> Array:
    """An output of an element that was called on its own."""
    promised = site.results[output]
    if value is None:
        return np.zeros(promised.shape, promised.dtype)
    where = f"{_where(batch, row)} (verify=False goes without)"
    array = _host_results.as_array(site, output, value, where)
    _host_results.check_element(site, output, array, where)
    return array


def _close(got: Array, wanted: Array, verify: float, noise: float) -> bool:
    if not jnp.issubdtype(got.dtype, np.inexact):
        return bool(np.array_equal(got, wanted))
    rtol = _tolerance(got.dtype) if verify is True else verify
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    # Relative to the largest number of the output, since small ones are often differences of large ones.
    atol = rtol * _largest([wanted]) + noise * min(_NOISE * _precision.epsilon(got.dtype), _MOST_NOISE)
    return bool(np.allclose(got.astype(wide), wanted.astype(wide), rtol, atol, equal_nan=True))


def _largest(arrays: Sequence[Any]) -> float:
    """The largest finite number in these arrays, without its sign."""
    largest = 0.0
    for array in arrays:
        if jnp.issubdtype(array.dtype, np.number):
            sizes = np.abs(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))
            largest = max(largest, float(sizes.max(initial=0.0, where=np.isfinite(sizes))))
    return largest


def _tolerance(dtype: np.dtype[Any]) -> float:
    width = _precision.bits(dtype)
    return 1e-6 if width >= 64 else 1e-3 if width == 32 else 2e-2


def _broken(site: HostSite, batch: Batch, place: tuple[int, int], values: tuple[Array, Array]) -> BatchContractError:
    row, output = place
    got, wanted = values
    path = site.results[output].path
    difference = _difference(got, wanted)
    shapes = _host_results.described(site, [array.shape for array in batch.arrays])
    return BatchContractError(
        f"{site.name} does not treat the elements of a batch one by one: it was given {batch.size} elements at once "
        f"(method {batch.method!r}, arguments {shapes}), and {f'output {path!r}' if path else 'the result'} of element "
        f"{row} {difference} from what that element gives on its own. {site.remedy('batch', _WAYS_OUT)}"
    )


def _difference(got: Array, wanted: Array) -> str:
    if not jnp.issubdtype(got.dtype, np.inexact):
        return f"differs in {int(np.sum(got != wanted))} places"
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        gaps = np.abs(got.astype(wide) - wanted.astype(wide))
    if np.array_equal(np.isfinite(got.astype(wide)), np.isfinite(wanted.astype(wide))):
        return f"differs by up to {float(gaps.max(initial=0.0, where=np.isfinite(gaps))):.3g}"
    return "differs in which numbers are finite"
