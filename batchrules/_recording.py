"""What host and device calls have in common as JAX primitives: their types, and a vmap rule that records the axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from batchrules import _placement, _rules
from batchrules._batch import Axes, BatchAxis, OutAxis


@dataclass(frozen=True)
class Result:
    """One output of one element, as it was promised."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    differentiable: bool = True


class Site(Protocol):
    """A call site, as far as its types go. Sites compare by value."""

    @property
    def results(self) -> tuple[Result, ...]:
        """What each output of one element is."""
        ...


def output_types(*avals: Any, site: Site, axes: Axes) -> tuple[Any, ...]:
    """The abstract evaluation rule: what was promised for one element, with the recorded axes in front."""
    return tuple(
        _placement.output_type(avals, axes, output, result.shape, result.dtype)
        for output, result in enumerate(site.results)
    )


@dataclass(frozen=True)
class MappedOperands:
    """The operands of a call under one more `jax.vmap`: mapped axes in front, and the axis to record."""

    operands: list[Any]
    axis: BatchAxis


def mapped_operands(axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None]) -> MappedOperands:
    """Bring the mapped axes to the front."""
    axis = BatchAxis(axis_data.size, tuple(dim is not None for dim in dims), mesh_axis=axis_data.explicit_mesh_axis)
    return MappedOperands([_rules.to_front(x, dim) for x, dim in zip(operands, dims, strict=True)], axis)


def bind_recorded(primitive: Any, mapped: MappedOperands, *, site: Site, axes: Axes) -> tuple[Any, Any]:
    """Bind with one axis more; the outputs and their mapped axes."""
    outputs = primitive.bind(*mapped.operands, site=site, axes=(mapped.axis, *axes))
    kept = [mapped.axis.output(i) is OutAxis.KEPT for i in range(len(outputs))]
    return outputs, [0 if is_kept else None for is_kept in kept]


def bind_unmapped(primitive: Any, operands: Sequence[Any], *, site: Site, axes: Axes) -> tuple[Any, Any]:
    """Bind a call that the axis passes by."""
    outputs = primitive.bind(*operands, site=site, axes=axes)
    return outputs, [None] * len(outputs)
