"""The elements of a recorded batch: what each call is given of each argument, and where its results go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules import _batch
from batchrules._batch import Axes, OutAxis
from batchrules._methods import Lead
from batchrules._recording import Result

Array = np.ndarray[Any, Any]
Chosen = Array | None  # the flat numbers of the elements that are called; None for all


class Elements:
    """The arguments of a batch, all axes flattened to one. Nothing is copied that need not be."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._row_numbers: dict[int, Array] = {}
        self.count = _batch.count(axes)

    def place(self, number: int) -> tuple[int, ...]:
        """The index of an element, one for each mapped axis."""
        return tuple(int(i) for i in np.unravel_index(number, _batch.sizes(self._axes)))

    def rows(self, argument: int, array: Array, chosen: Chosen = None) -> Iterator[Array]:
        """One argument of each element."""
        axes = _batch.argument_axes(self._axes, argument)
        if not axes:
            return itertools.repeat(array)
        rows = merged(array, len(axes))
        if chosen is None and len(axes) == len(self._axes):
            return _views(rows, range(self.count))
        return _views(rows, self._numbers(argument, axes, chosen).tolist())

    def led(self, argument: int, array: Array, lead: Lead, numbers: slice | Array) -> Array:
        """One argument of these elements with the leading dimension that a method gives it, read-only."""
        axes = _batch.argument_axes(self._axes, argument)
        if not axes:
            return _repeated(array, lead, _length(numbers))
        rows = merged(array, len(axes))
        if len(axes) == len(self._axes):
            return rows[numbers] if isinstance(numbers, slice) else read_only(rows[numbers])
        return read_only(rows[self._numbers(argument, axes, None)[numbers]])

    def ends(self, argument: int, array: Array) -> Array | None:
        """The first and the last that there is of an argument; None if there is but one."""
        axes = _batch.argument_axes(self._axes, argument)
        rows = merged(array, len(axes)) if axes else array[None]
        return rows if len(rows) > 1 else None

    def _numbers(self, argument: int, axes: Axes, chosen: Chosen) -> Array:
        """For each element, the row of an argument."""
        if len(axes) == len(self._axes):
            return np.arange(self.count) if chosen is None else chosen
        if argument not in self._row_numbers:
            along = [axis.in_batched[argument] for axis in self._axes]
            self._row_numbers[argument] = _row_numbers(self._axes, along)
        numbers = self._row_numbers[argument]
        return numbers if chosen is None else numbers[chosen]


def _length(numbers: slice | Array) -> int:
    return numbers.stop - numbers.start if isinstance(numbers, slice) else len(numbers)


def _repeated(array: Array, lead: Lead, count: int) -> Array:
    if lead is Lead.NOTHING:
        return array
    return np.broadcast_to(array, (count if lead is Lead.BATCH else 1, *array.shape))


class Outputs:
    """The outputs of a batch, flat, while they come in; one that is summed over an axis has one row for all of it."""

    def __init__(self, results: Sequence[Result], axes: Axes) -> None:
        self._results = results
        self._axes = axes
        self._rows = [self._rows_of(output) for output in range(len(results))]
        self.buffers = self._empty()

    def _empty(self) -> list[Array]:
        return [
            np.zeros(
                (_batch.count(_batch.output_axes(self._axes, output)), *result.shape), _sum_dtype(result.dtype, rows)
            )
            for output, (result, rows) in enumerate(zip(self._results, self._rows, strict=True))
        ]

    def _rows_of(self, output: int) -> Array | None:
        """For each element, the row of an output that is summed over some axes; None where each has its own."""
        kept = [axis.output(output) is OutAxis.KEPT for axis in self._axes]
        return None if all(kept) else _row_numbers(self._axes, kept)

    @property
    def sums(self) -> bool:
        """Whether any output is summed over some axes."""
        return any(rows is not None for rows in self._rows)

    def store(self, number: int, output: int, value: Any) -> None:
        """Take an output of one element."""
        rows = self._rows[output]
        if rows is None:
            self.buffers[output][number] = value
        else:
            self.buffers[output][rows[number]] += value

    def store_many(self, numbers: slice | Array, output: int, values: Array, *, keep: bool) -> None:
        """Take an output of several elements. `keep` says that the array may be kept: it will not change."""
        rows, buffer = self._rows[output], self.buffers[output]
        if rows is not None and len(values) == _batch.count(self._axes):
            self.buffers[output] = self._summed(output, values, buffer.dtype)
        elif keep and rows is None and len(values) == len(buffer):
            self.buffers[output] = values
        elif rows is None:
            buffer[numbers] = values
        elif len(buffer) == 1:
            buffer[0] += values.sum(0, dtype=buffer.dtype)
        else:
            np.add.at(buffer, rows[numbers], values)

    def _summed(self, output: int, values: Array, dtype: np.dtype[Any]) -> Array:
        by_axis = values.reshape(*_batch.sizes(self._axes), *values.shape[1:])
        along = tuple(p for p, axis in enumerate(self._axes) if axis.output(output) is not OutAxis.KEPT)
        summed = by_axis.sum(along, dtype=dtype)
        return summed.reshape(self.buffers[output].shape)

    def clear(self) -> None:
        """Start anew, in other buffers: these may be the function's own by now."""
        self.buffers = self._empty()

    def fail(self, numbers: int | slice | Array) -> None:
        """Make elements NaN."""
        for rows, buffer in zip(self._rows, self.buffers, strict=True):
            # Both parts of a complex number: a complex step reads the imaginary one.
            nan = complex(np.nan, np.nan) if buffer.dtype.kind == "c" else np.nan
            buffer[numbers if rows is None else rows[numbers]] = nan

    def shaped(self) -> tuple[Array, ...]:
        """The outputs with their axes in front."""
        return tuple(
            buffer.astype(result.dtype, copy=False).reshape(_batch.output_shape(self._axes, output, result.shape))
            for output, (buffer, result) in enumerate(zip(self.buffers, self._results, strict=True))
        )


def _sum_dtype(dtype: np.dtype[Any], rows: Array | None) -> np.dtype[Any]:
    """Numbers of 16 bits and fewer are summed in 32."""
    is_narrow = rows is not None and jnp.issubdtype(dtype, np.floating) and dtype.itemsize < 4
    return np.dtype("float32") if is_narrow else dtype


def _row_numbers(axes: Axes, along: Sequence[bool]) -> Array:
    """For each element of a batch, the row of an array that has only some of its axes."""
    lead = tuple(axis.size if is_there else 1 for axis, is_there in zip(axes, along, strict=True))
    numbers = np.arange(math.prod(lead)).reshape(lead)
    return np.broadcast_to(numbers, _batch.sizes(axes)).reshape(-1)


def merged(array: Array, lead: int) -> Array:
    """The array with its leading dimensions flattened to one."""
    # A reshape is a writable copy where the array is not contiguous.
    return array if lead == 1 else read_only(array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:]))


def read_only(array: Array) -> Array:
    """The array, no longer writeable."""
    array.flags.writeable = False
    return array


def _views(rows: Array, numbers: Iterable[int]) -> Iterator[Array]:
    if rows.ndim > 1:
        return iter(rows) if isinstance(numbers, range) else map(rows.__getitem__, numbers)
    # Indexing with a bare number would give a NumPy scalar where the function was promised an array.
    return map(rows.__getitem__, zip(numbers, itertools.repeat(...)))
