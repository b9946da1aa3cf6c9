"""What stays the same from run to run of one recorded batch: the site, its axes, and how failures are told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from batchrules import _batch, _failures, _host_results
from batchrules._batch import Axes
from batchrules._errors import DispatchError
from batchrules._host_elements import Array, Elements
from batchrules._host_site import HostSite
from batchrules._surroundings import Surroundings

Shapes = Sequence[tuple[int, ...]]


class Frame:
    """One call site over one recorded batch.

    Attributes:
        site: The call site.
        axes: The recorded axes; none for a single call.
        elements: The elements of the arguments that a call is given: all operands but the mask of `where`.
        choice: The method, and why.
        mapped: For each argument, whether it is mapped along any axis.
        element_shapes: For each argument, the shape of one element.
    """

    def __init__(self, site: HostSite, axes: Axes, shapes: Shapes, around: Surroundings) -> None:
        self.site = site
        self.axes = axes
        self._around = around
        given_axes = tuple(replace(axis, in_batched=axis.in_batched[site.masks :]) for axis in axes)
        given = shapes[site.masks :]
        self.elements = Elements(given_axes)
        self.choice = _batch.choose_for(site.request, given_axes, site.paths[site.masks :], given)
        self.mapped = _batch.mapped(given_axes, len(given))
        self.element_shapes = [_batch.element_shape(given_axes, i, shape) for i, shape in enumerate(given)]
        self._promises = [(result.shape, result.dtype) for result in site.results]

    def result(self, output: int, value: Any, number: int | None) -> Array:
        """An output of one element, if it is what was promised."""
        shape, dtype = self._promises[output]
        # Not what is derived from ndarray: a masked array is no plain array.
        is_plain = type(value) is np.ndarray or isinstance(value, np.generic)
        if is_plain and value.dtype == dtype and value.shape == shape:
            return np.asarray(value)
        if value is None:
            return np.zeros(shape, dtype)
        where = self._where(number)
        array = _host_results.as_array(self.site, output, value, where)
        _host_results.check_element(self.site, output, array, where)
        return array

    def _where(self, number: int | None) -> str:
        place = () if number is None else self.place(number)
        return f" at element {place}{self.of}" if place else ""

    @property
    def of(self) -> str:
        """What the index of an element counts in, if that is not the whole batch."""
        return " of its device's shard" if self._around.shard else ""

    def place(self, number: int) -> tuple[int, ...]:
        """The index of an element, one for each axis that the user mapped."""
        return self.elements.place(number)[self._around.hidden :]

    @property
    def points(self) -> int:
        """How many times each element is called."""
        return math.prod(axis.size for axis in self.axes[: self._around.hidden])

    def fail(self, error: BaseException, number: int | None) -> NoReturn:
        """Raise the failure of one element."""
        self._raise(error, self._where(number), self.element_shapes)

    def fail_many(self, error: BaseException, numbers: tuple[int, int], shapes: Shapes) -> NoReturn:
        """Raise the failure of a call that was given the elements from the first to the last of these numbers."""
        first, last = (self.place(number) for number in numbers)
        place = f" with the elements from {first} to {last}{self.of}, given at once" if first else ""
        self._raise(error, place, shapes)

    def surface(self, error: BaseException) -> NoReturn:
        """Raise a failure that belongs to no element."""
        self._raise(error, "", self.element_shapes)

    def _raise(self, error: BaseException, place: str, shapes: Shapes) -> NoReturn:
        site = self.site
        clearer = _clearer(site.name, error)
        if clearer is not None:
            clearer.__cause__ = error
            error = clearer
        text = _failures.story(site.name, place, _host_results.described(site, shapes), error)
        _failures.surface(error, text, compiled=self._around.compiled)


def _clearer(name: str, error: BaseException) -> Exception | None:
    """A clearer error in place of one, if there is any."""
    if isinstance(error, DispatchError):
        return DispatchError(f"{name}: {error}")
    return _host_results.read_only_error(name, error)
