"""What stays the same from run to run of one recorded batch: the site, its axes, and how failures are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from batchrules import _batch, _failures, _host_results
from batchrules._batch import Axes
from batchrules._errors import DispatchError
from batchrules._host_elements import Array, Elements
from batchrules._host_site import HostSite

Shapes = Sequence[tuple[int, ...]]


class Frame:
    """One call site over one recorded batch.

    Attributes:
        site: The call site.
        axes: The recorded axes; none for a single call.
        elements: The elements of the arguments that a call is given: all operands but the mask of `where`.
        choice: The method, and why.
    """

    def __init__(self, site: HostSite, axes: Axes, shapes: Shapes, *, compiled: bool) -> None:
        self.site = site
        self.axes = axes
        self._compiled = compiled
        given_axes = tuple(replace(axis, in_batched=axis.in_batched[site.masks :]) for axis in axes)
        given = shapes[site.masks :]
        self.elements = Elements(given_axes)
        self.choice = _batch.choose_for(site.request, given_axes, site.paths[site.masks :], given)
        self.element_shapes = [_batch.element_shape(given_axes, i, shape) for i, shape in enumerate(given)]
        self._promises = [(result.shape, result.dtype) for result in site.results]

    def result(self, output: int, value: Any, number: int | None) -> Array:
        """An output of one element, if it is what was promised."""
        shape, dtype = self._promises[output]
        if type(value) is np.ndarray and value.dtype == dtype and value.shape == shape:
            return value
        if value is None:
            return np.zeros(shape, dtype)
        where = self._where(number)
        array = _host_results.as_array(self.site, output, value, where)
        _host_results.check_element(self.site, output, array, where)
        return array

    def _where(self, number: int | None) -> str:
        return "" if number is None or not self.axes else f" at element {self.elements.place(number)}"

    def fail(self, error: BaseException, number: int | None) -> NoReturn:
        """Raise the failure of one element."""
        self._raise(error, self._where(number), self.element_shapes)

    def fail_many(self, error: BaseException, numbers: tuple[int, int], shapes: Shapes) -> NoReturn:
        """Raise the failure of a call that was given the elements from the first to the last of these numbers."""
        first, last = (self.elements.place(number) for number in numbers)
        self._raise(error, f" with the elements from {first} to {last}, given at once", shapes)

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
        _failures.surface(error, text, compiled=self._compiled)


def _clearer(name: str, error: BaseException) -> Exception | None:
    """A clearer error in place of one, if there is any."""
    if isinstance(error, DispatchError):
        return DispatchError(f"{name}: {error}")
    return _host_results.read_only_error(name, error)
