"""A recorded batch: the axes that a call was mapped over, in order, the outermost first.

Mapped arguments keep their axes in front, unmapped arguments have none, and outputs have all of them. Everything here
is arithmetic on shapes; `_host_runner` executes a batch with NumPy and `_rules` with JAX operations.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchrules._methods import Argument, Choice, MethodRequest, as_if_mapped, asked_for, choose


class OutAxis(enum.Enum):
    """What becomes of a mapped axis in an output."""

    KEPT = "the output has the axis"
    ABSENT = "the output does not depend on the axis, and does not have it"
    SUMMED = "the output is summed over the axis"


@dataclass(frozen=True)
class BatchAxis:
    """One mapped axis.

    Attributes:
        size: Its size.
        in_batched: For each argument, whether it is mapped along this axis.
        outputs: For each output, what becomes of this axis; None means that all have it.
        mesh_axis: The Explicit mesh axis (or a tuple of them) that shards it, or None.
    """

    size: int
    in_batched: tuple[bool, ...]
    outputs: tuple[OutAxis, ...] | None = None
    mesh_axis: Any = None

    def output(self, output: int) -> OutAxis:
        """What becomes of this axis in an output."""
        return OutAxis.KEPT if self.outputs is None else self.outputs[output]


Axes = tuple[BatchAxis, ...]
_UNSUMMED = {OutAxis.SUMMED: OutAxis.KEPT}


def count(axes: Axes) -> int:
    """The number of elements."""
    return math.prod(axis.size for axis in axes)


def sizes(axes: Axes) -> tuple[int, ...]:
    """The size of each axis."""
    return tuple(axis.size for axis in axes)


def mapped(axes: Axes, arguments: int) -> tuple[bool, ...]:
    """For each argument, whether it is mapped along any axis."""
    if len(axes) == 1:
        return axes[0].in_batched
    return tuple(any(axis.in_batched[i] for axis in axes) for i in range(arguments))


def argument_axes(axes: Axes, argument: int) -> Axes:
    """The axes that an argument is mapped along."""
    return tuple(axis for axis in axes if axis.in_batched[argument])


def output_axes(axes: Axes, output: int) -> Axes:
    """The axes that an output has."""
    return tuple(axis for axis in axes if axis.output(output) is OutAxis.KEPT)


def unsummed(axes: Axes) -> Axes:
    """The axes of the same call, whose outputs are those of each element where these are summed."""
    return tuple(
        replace(axis, outputs=axis.outputs and tuple(_UNSUMMED.get(output, output) for output in axis.outputs))
        for axis in axes
    )


def element_shape(axes: Axes, argument: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one element of an argument that comes with its mapped axes in front."""
    return tuple(shape[len(argument_axes(axes, argument)) :])


def output_shape(axes: Axes, output: int, element: Sequence[int]) -> tuple[int, ...]:
    """The shape of an output with its axes in front."""
    return (*sizes(output_axes(axes, output)), *element)


def aligned_shape(axes: Axes, argument: int, shape: Sequence[int]) -> tuple[int, ...]:
    """An argument's shape with every axis present: 1 along those that it is not mapped along."""
    lead = tuple(axis.size if axis.in_batched[argument] else 1 for axis in axes)
    return (*lead, *element_shape(axes, argument, shape))


def localised(axes: Axes, devices: Sequence[int]) -> Axes:
    """The axes as one device sees them, where each is split over so many devices."""
    return tuple(
        replace(axis, size=axis.size // parts, mesh_axis=None) for axis, parts in zip(axes, devices, strict=True)
    )


def choose_for(request: MethodRequest, axes: Axes, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Choice:
    """The method for a recorded batch; `shapes` are the arguments' shapes with their axes."""
    is_mapped = mapped(axes, len(shapes))
    if request.method != "auto":
        return asked_for(request.method, as_if_mapped(request, is_mapped))
    first_follower = len(shapes) - request.followers
    return choose(
        request,
        [
            Argument(path, element_shape(axes, i, shape), is_mapped[i], follows=i >= first_follower)
            for i, (path, shape) in enumerate(zip(paths, shapes, strict=True))
        ],
    )
