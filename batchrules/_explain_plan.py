"""The calls that a recorded batch becomes, from shapes and dtypes alone: how many, of how many elements and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchrules import _batch
from batchrules._batch import Axes
from batchrules._explain_count import Tally, exactly
from batchrules._methods import Choice, Lead
from batchrules._sites import Site

SINGLE = Choice("sequential", "nothing is mapped, so this is one call for one element")


@dataclass(frozen=True)
class Plan:
    """The calls of one batch.

    Attributes:
        choice: The method, and why.
        count: The number of elements.
        first: How many elements the first call is given.
        last: How many the last one is given.
        tally: All calls taken together.
    """

    choice: Choice
    count: int
    first: int
    last: int
    tally: Tally


@dataclass(frozen=True)
class Batch:
    """One site over one recorded batch, with its operands' types: shapes with their mapped axes in front, and dtypes.

    Attributes:
        site: The call site.
        axes: The recorded axes; none for a single call.
        operands: Things with `.shape` and `.dtype`.
    """

    site: Site
    axes: Axes
    operands: Sequence[Any]

    @property
    def given_axes(self) -> Axes:
        """The axes as the operands see them that a call is given: all but the mask of `where`."""
        masks = self.site.masks
        return tuple(replace(axis, in_batched=axis.in_batched[masks:]) for axis in self.axes)

    @property
    def given(self) -> Sequence[Any]:
        """The operands that a call is given."""
        return self.operands[self.site.masks :]

    def chosen(self) -> Choice:
        """The method, and why."""
        if not self.axes:
            return SINGLE
        shapes = [tuple(operand.shape) for operand in self.given]
        return _batch.choose_for(self.site.request, self.given_axes, self.site.paths[self.site.masks :], shapes)

    def plan(self, choice: Choice) -> Plan:
        """The calls by this method."""
        count = _batch.count(self.axes)
        if count == 0:
            return Plan(choice, 0, 0, 0, Tally())
        weights = [
            math.prod(_batch.element_shape(self.given_axes, i, operand.shape)) * itemsize(operand.dtype)
            for i, operand in enumerate(self.given)
        ]
        result = sum(math.prod(result.shape) * itemsize(result.dtype) for result in self.site.results)
        if not self.axes or not choice.vectorised:
            return Plan(choice, count, 1, 1, _tally(count, count, count * sum(weights), count * result))
        return _vectorised(choice, (count, self.site.batch_size), weights, result)


def _vectorised(choice: Choice, sizes: tuple[int, int | None], weights: Sequence[int], result: int) -> Plan:
    count, batch_size = sizes
    size = min(batch_size or count, count)
    calls = -(-count // size)
    bytes_in = sum(_led(lead, count, calls) * weight for lead, weight in zip(choice.leads, weights, strict=True))
    tally = _tally(calls, count, bytes_in, count * result)
    return Plan(choice, count, size, count - (calls - 1) * size, tally)


def _led(lead: Lead, count: int, calls: int) -> int:
    """How many times an element of an argument is given, in all calls taken together."""
    return count if lead is Lead.BATCH else calls


def _tally(calls: int, elements: int, bytes_in: int, bytes_out: int) -> Tally:
    return Tally(exactly(calls), exactly(elements), exactly(bytes_in), exactly(bytes_out))


def itemsize(dtype: Any) -> int:
    """The bytes of one number, of the dtypes that only JAX has too."""
    return int(getattr(dtype, "itemsize", 0))
