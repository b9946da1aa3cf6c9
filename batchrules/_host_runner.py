"""Execute a recorded batch of a host function with NumPy: all axes flattened to one, one leading dimension.

JAX takes no part. The arrays come with their mapped axes in front, unmapped ones without; the outputs go back with all
axes in front.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from batchrules import _batch
from batchrules._batch import Axes
from batchrules._host_context import run_inside, running
from batchrules._host_function import BatchGiven, HostFunction, as_array, check_batch, check_element
from batchrules._methods import Lead

Array = np.ndarray[Any, Any]


class Runner:
    """Runs one call site over one recorded batch.

    Args:
        function: The call site.
        axes: The recorded axes; none for a single call.
        shapes: The shape of each argument, with its mapped axes in front.
    """

    def __init__(self, function: HostFunction, axes: Axes, shapes: Sequence[tuple[int, ...]]) -> None:
        self._function = function
        self._axes = axes
        self._count = _batch.count(axes)
        self.choice = _batch.choose_for(function.request, axes, function.paths, shapes)
        self._work = self._pick()
        self._simple = function.flat
        self._bare: Callable[..., tuple[Array, ...]] | None = None

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        """The outputs, with all axes in front."""
        if self._bare is not None:
            return self._bare(*arrays)
        outputs = run_inside(self._work, arrays, allow_jax=self._function.allow_jax)
        function = self._function.first_call.unguarded()
        if self._simple and not self._axes and function is not None:
            self._bare = self._bare_call(function)
        return outputs

    def _bare_call(self, function: Callable[..., Any]) -> Callable[..., tuple[Array, ...]]:
        """One call of a function from arrays to one array, with nothing around it that can be done without."""
        site, promised, numpy_only = self._function, self._function.results[0], not self._function.allow_jax
        shape, dtype, array_type = promised.shape, promised.dtype, np.ndarray

        def call(*arrays: Array) -> tuple[Array, ...]:
            # What run_inside does, without a call more: this is the path of a small function called often.
            before, running.numpy_only = running.numpy_only, numpy_only
            try:
                value = function(*arrays)
            except ValueError as error:
                site.explain(error)
                raise
            finally:
                running.numpy_only = before
            if type(value) is array_type and value.dtype == dtype and value.shape == shape:
                return (value,)
            return tuple(self._element(0, leaf, "") for leaf in site.result_leaves(value))

        return call

    def _pick(self) -> Callable[[Sequence[Array]], tuple[Array, ...]]:
        if not self._axes:
            return self._single
        if self._count == 0:
            return self._empty
        return self._vectorised if self.choice.vectorised else self._sequential

    def _single(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        results = self._function.call(arrays)
        return tuple(self._element(output, value, "") for output, value in enumerate(results))

    def _element(self, output: int, value: Any, where: str) -> Array:
        array = as_array(self._function, output, value, where)
        check_element(self._function, output, array, where)
        return array

    def _empty(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        del arrays
        return self._shaped(self._buffers())

    def _buffers(self) -> list[Array]:
        return [np.empty((self._count, *result.shape), result.dtype) for result in self._function.results]

    def _shaped(self, flat: Iterable[Array]) -> tuple[Array, ...]:
        lead = _batch.sizes(self._axes)
        return tuple(array.reshape(*lead, *array.shape[1:]) for array in flat)

    def _sequential(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        buffers = self._buffers()
        elements = zip(*(self._rows(i, array) for i, array in enumerate(arrays)), strict=False)
        first = next(elements)
        # The first call alone runs under the guard; the loop after it is as bare as can be.
        self._store(buffers, 0, self._function.call(first))
        bare = self._function.first_call.unguarded()
        if self._simple and bare is not None:
            self._fill_simple(buffers[0], bare, elements)
        else:
            for index, leaves in enumerate(elements, start=1):
                self._store(buffers, index, self._function.call(leaves))
        return self._shaped(buffers)

    def _fill_simple(self, buffer: Array, function: Callable[..., Any], elements: Iterable[Sequence[Array]]) -> None:
        dtype, shape = buffer.dtype, buffer.shape[1:]
        index = 0
        try:
            for leaves in elements:
                index += 1
                value = function(*leaves)
                exact = type(value) is np.ndarray or isinstance(value, np.generic)
                if exact and value.dtype == dtype and value.shape == shape:
                    buffer[index] = value
                else:
                    self._store([buffer], index, self._function.result_leaves(value))
        except ValueError as error:
            self._function.explain(error)
            raise

    def _store(self, buffers: Sequence[Array], index: int, values: Sequence[Any]) -> None:
        for output, (buffer, value) in enumerate(zip(buffers, values, strict=True)):
            buffer[index] = self._element(output, value, self._where(index))

    def _where(self, index: int) -> str:
        place = np.unravel_index(index, _batch.sizes(self._axes))
        return f" at element {tuple(int(i) for i in place)}"

    def _rows(self, argument: int, array: Array) -> Iterator[Array]:
        """The elements of one argument, in the order of the flat batch, without a copy."""
        axes = _batch.argument_axes(self._axes, argument)
        if not axes:
            return itertools.repeat(array)
        rows = _merged(array, len(axes))
        if len(axes) == len(self._axes):
            return _views(rows, range(self._count))
        return _views(rows, self._row_numbers(argument).tolist())

    def _row_numbers(self, argument: int) -> Array:
        """For each element of the flat batch, the row of an argument that is mapped along some axes only."""
        lead = tuple(axis.size if axis.in_batched[argument] else 1 for axis in self._axes)
        numbers = np.arange(np.prod(lead, dtype=np.intp)).reshape(lead)
        return np.broadcast_to(numbers, _batch.sizes(self._axes)).reshape(-1)

    def _vectorised(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        leads = self.choice.leads
        given = [self._led(i, array, lead) for i, (array, lead) in enumerate(zip(arrays, leads, strict=True))]
        size = self._function.batch_size or self._count
        if size >= self._count:
            return self._shaped(self._call_batch(given, self._count))
        buffers = self._buffers()
        for start in range(0, self._count, size):
            stop = min(start + size, self._count)
            chunk = [_chunk(array, lead, start, stop) for array, lead in zip(given, leads, strict=True)]
            for buffer, output in zip(buffers, self._call_batch(chunk, stop - start), strict=True):
                buffer[start:stop] = output
        return self._shaped(buffers)

    def _led(self, argument: int, array: Array, lead: Lead) -> Array:
        """An argument with the leading dimension that its method gives it, read-only and without needless copies."""
        axes = _batch.argument_axes(self._axes, argument)
        if len(axes) == len(self._axes):
            return _merged(array, len(axes))
        if axes:
            return _read_only(_merged(array, len(axes))[self._row_numbers(argument)])
        if lead is Lead.NOTHING:
            return array
        return np.broadcast_to(array, (self._count if lead is Lead.BATCH else 1, *array.shape))

    def _call_batch(self, arrays: Sequence[Array], size: int) -> list[Array]:
        """Call with a batch of that size; every output comes back leading with it."""
        given = BatchGiven(self.choice.method, size, tuple(array.shape for array in arrays))
        outputs = []
        for output, value in enumerate(self._function.call(arrays)):
            array = as_array(self._function, output, value, f" with a batch of {size} elements")
            check_batch(self._function, output, array, given)
            outputs.append(np.broadcast_to(array, (size, *array.shape[1:])))
        return outputs


def _merged(array: Array, lead: int) -> Array:
    """The array with its leading dimensions flattened to one."""
    # A reshape is a writable copy where the array is not contiguous.
    return array if lead == 1 else _read_only(array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:]))


def _views(rows: Array, numbers: Iterable[int]) -> Iterator[Array]:
    if rows.ndim > 1:
        return iter(rows) if isinstance(numbers, range) else map(rows.__getitem__, numbers)
    # Indexing with a bare number would give a NumPy scalar where the function was promised an array.
    return map(rows.__getitem__, zip(numbers, itertools.repeat(...)))


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _chunk(array: Array, lead: Lead, start: int, stop: int) -> Array:
    return array[start:stop] if lead is Lead.BATCH else array
