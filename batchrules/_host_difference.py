"""Finite differences of a recorded batch: all perturbed points of all elements go out as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from batchrules import _batch
from batchrules._batch import Axes, BatchAxis, OutAxis
from batchrules._errors import NotDifferentiableError
from batchrules._finite_difference import Difference, check_real, difference, perturbed, step_along
from batchrules._host_body import Endpoints, HostBody, Primal
from batchrules._host_context import FirstCall
from batchrules._host_elements import Array
from batchrules._host_endpoints import GivenJacobian, GivenTangent
from batchrules._host_runner import Runner
from batchrules._host_site import HostSite
from batchrules._host_skipped import masked_batch, nonzero_elements, with_all_axes, zero_elsewhere
from batchrules._sites import select
from batchrules._surroundings import Surroundings


class DifferenceRunner:
    """Runs a tangent site, or the site of a Jacobian, by differences of its base.

    Args:
        site: The derived site.
        base: The site that it was derived from.
        axes: The recorded axes of the derived site.
        how: The scheme, and the function that is differenced.
        around: What surrounds the run.
    """

    def __init__(self, site: HostSite, base: HostSite, axes: Axes, how: Difference, around: Surroundings) -> None:
        body = site.body
        if not isinstance(body, GivenTangent | GivenJacobian) or not isinstance(base.body, Primal):
            raise NotDifferentiableError(
                f"{site.name}: finite differences serve a function's first derivative, and not the derivative of an "
                "endpoint. Give second derivatives by endpoints of your own."
            )
        self._site = site
        self._how = how
        self._around = around
        self._moving = [False] * site.masks + list(body.nonzero if isinstance(body, GivenTangent) else body.wanted)
        self._base = _evaluated(base, base.body, how, body.outputs)
        self._axes = tuple(replace(axis, in_batched=tuple(self._used(axis.in_batched))) for axis in axes)

    def _used(self, operands: Sequence[Any]) -> list[Any]:
        """The arguments and the tangents, without the outputs that stand between them if they are passed."""
        return [*operands[: len(self._moving)], *operands[len(operands) - self._site.linear :]]

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        """The output tangents, with the axes that they keep in front."""
        operands = self._used(arrays)
        count = len(self._moving)
        outputs = self._along(self._axes, operands[:count], operands[count:])
        return tuple(self._kept(output, position) for position, output in enumerate(outputs))

    def _kept(self, output: Array, position: int) -> Array:
        along = tuple(p for p, axis in enumerate(self._axes) if axis.output(position) is not OutAxis.KEPT)
        return output.sum(along).astype(output.dtype) if along else output

    def blocks(self, *arrays: Array) -> tuple[Array, ...]:
        """The blocks of the Jacobian: for each output in use, one for each argument in use."""
        count = len(self._moving)
        given = arrays[:count]
        moved = [i for i, is_moving in enumerate(self._moving) if is_moving]
        check_real(self._how, [given[i] for i in moved], "arguments", self._site.name)
        shapes = [_batch.element_shape(self._axes, i, given[i].shape) for i in moved]
        sizes = [int(np.prod(shape)) for shape in shapes]
        basis = [
            _unit_rows(sum(sizes), sum(sizes[:k]), shape, given[i].dtype)
            for k, (i, shape) in enumerate(zip(moved, shapes, strict=True))
        ]
        direction = BatchAxis(sum(sizes), (*[False] * count, *[True] * len(moved)))
        axes = (direction, *(replace(a, in_batched=(*a.in_batched[:count], *[False] * len(moved))) for a in self._axes))
        columns = self._along(axes, given, basis, hidden=1)
        blocks = []
        for output in columns:
            start = 0
            for shape, size in zip(shapes, sizes, strict=True):
                block = np.moveaxis(output[start : start + size], 0, -1)
                blocks.append(block.reshape((*block.shape[:-1], *shape)))
                start += size
        return tuple(blocks)

    def _along(self, axes: Axes, given: Sequence[Array], tangents: Sequence[Array], hidden: int = 0) -> list[Array]:
        """The outputs' derivatives along the tangents, with all axes in front, of which `hidden` are ours."""
        count = len(given)
        moved = [i for i, is_moving in enumerate(self._moving) if is_moving]
        if self._how.scheme == "complex_step":
            check_real(self._how, [given[i] for i in moved], "arguments", self._site.name)
        whole = {i: with_all_axes(axes, i, given[i]) for i in moved}
        vectors = {i: with_all_axes(axes, count + k, tangents[k]) for k, i in enumerate(moved)}
        step = step_along(self._how, [(whole[i], vectors[i]) for i in moved], len(axes))
        step = np.broadcast_to(step, _batch.sizes(axes))
        points = {i: self._points(whole[i], vectors[i], step) for i in moved}
        wanted = nonzero_elements(vectors.values(), _batch.sizes(axes)) if self._skips_zero else None
        values = self._values(axes, given, points, (hidden, wanted))
        if self._how.scheme == "forward":
            # A copy, because the next call may use the same buffer.
            copies = [[output.copy() for output in value] for value in values]
            values = [*copies, self._values_here(axes, given, wanted)]
        outputs = [difference(self._how.scheme, of_output, step) for of_output in zip(*values, strict=True)]
        return outputs if wanted is None else [zero_elsewhere(output, wanted) for output in outputs]

    @property
    def _skips_zero(self) -> bool:
        # A Jacobian has no direction of zeros.
        return self._site.conduct.skip_zero and self._site.linear > 0

    def _points(self, x: Array, t: Array, step: Array) -> Array:
        aligned = step.reshape(step.shape + (1,) * (x.ndim - step.ndim))
        signs = {"central": (1, -1), "forward": (1,), "complex_step": (1j,)}[self._how.scheme]
        points = np.stack([perturbed(x, t, sign * aligned) for sign in signs])
        points.flags.writeable = False
        return points

    def _values(
        self, axes: Axes, given: Sequence[Array], points: dict[int, Array], which: tuple[int, Array | None]
    ) -> list[list[Array]]:
        """The function at the perturbed points: for each sign, its outputs with all axes in front."""
        hidden, wanted = which
        signs = len(next(iter(points.values())))
        moved = tuple(i in points for i in range(len(given)))
        outer = BatchAxis(signs, moved)
        inner = (
            replace(axis, in_batched=tuple(m or b for m, b in zip(moved, axis.in_batched, strict=False)), outputs=None)
            for axis in axes
        )
        arrays = [points.get(i, array) for i, array in enumerate(given)]
        outputs = self._run((outer, *inner), arrays, (1 + hidden, wanted))
        return [[output[k] for output in outputs] for k in range(signs)]

    def _values_here(self, axes: Axes, given: Sequence[Array], wanted: Array | None) -> list[Array]:
        """The function at the elements themselves, once for each and not for each direction."""
        count = len(given)
        here = [any(axis.in_batched[:count]) for axis in axes]
        own = tuple(replace(a, in_batched=a.in_batched[:count], outputs=None) for a in select(axes, here))
        others = tuple(p for p, is_here in enumerate(here) if not is_here)
        outputs = self._run(own, given, (0, None if wanted is None else np.asarray(wanted.any(axis=others))))
        lead = tuple(axis.size if is_here else 1 for axis, is_here in zip(axes, here, strict=True))
        return [
            np.broadcast_to(x.reshape(*lead, *x.shape[len(own) :]), (*_batch.sizes(axes), *x.shape[len(own) :]))
            for x in outputs
        ]

    def batches(self, operands: Sequence[Any], *, columns: bool) -> list[tuple[HostSite, Axes, Sequence[Any]]]:
        """What the function would be called for: sites, with their axes and the types of their operands.

        Args:
            operands: Things with `.shape` and `.dtype`: those of the derived site, or of the site of a Jacobian.
            columns: Whether it is a Jacobian, with one direction for each entry of the arguments in use.
        """
        count = len(self._moving)
        given = operands[:count] if columns else self._used(operands)[:count]
        shapes = [_batch.element_shape(self._axes, i, x.shape) for i, x in enumerate(given)]
        entries = sum(int(np.prod(shape)) for shape in select(shapes, self._moving))
        axes = (BatchAxis(entries, (False,) * count), *self._axes) if columns else self._axes
        own = tuple(replace(axis, in_batched=axis.in_batched[:count], outputs=None) for axis in axes)
        beside = (self._base, *self._beside(own, given, shapes))
        if self._how.scheme != "forward":
            return [beside]
        return [beside, (self._base, tuple(axis for axis in own if any(axis.in_batched)), given)]

    def _beside(self, axes: Axes, given: Sequence[Any], shapes: Sequence[Any]) -> tuple[Axes, Sequence[Any]]:
        """The axes of the perturbed points, and the types of their operands."""
        signs, how, moving = 2 if self._how.scheme == "central" else 1, self._how, tuple(self._moving)
        lead = (signs, *_batch.sizes(axes))
        points = [
            _like(x, (*lead, *shape), how) if is_moving else x
            for x, shape, is_moving in zip(given, shapes, moving, strict=True)
        ]
        inner = (replace(a, in_batched=tuple(m or b for m, b in zip(moving, a.in_batched, strict=True))) for a in axes)
        return (BatchAxis(signs, moving), *inner), points

    def _run(self, axes: Axes, arrays: Sequence[Array], which: tuple[int, Array | None]) -> tuple[Array, ...]:
        """The function, one by one for the elements alone that are wanted, if not all are."""
        hidden, wanted = which
        around = replace(self._around, hidden=hidden)
        runner = Runner(self._base, axes, [array.shape for array in arrays], around)
        if wanted is None or runner.choice.vectorised:
            return runner(*arrays)
        site, axes, arrays = masked_batch(self._base, axes, arrays, wanted)
        return Runner(site, axes, [array.shape for array in arrays], around)(*arrays)


def _evaluated(base: HostSite, primal: Primal, how: Difference, outputs: Sequence[bool]) -> HostSite:
    """The site of the function that is differenced."""
    body = replace(primal, endpoints=Endpoints())
    if how.function is not primal.function:
        first_call = FirstCall(how.function, primal.name, allow_jax=base.conduct.allow_jax)
        body = replace(body, function=how.function, first_call=first_call)
    results, name = tuple(select(base.results, outputs)), f"{base.name} (finite difference)"
    if how.scheme == "complex_step":
        check_real(how, results, "results", base.name)
        name = f"{base.name} (finite difference by 'complex_step', which gives and takes complex numbers)"
        results = tuple(replace(result, dtype=np.result_type(result.dtype, np.complex64)) for result in results)
    in_use: HostBody = body if all(outputs) else _InUse(body, tuple(outputs))
    return replace(base, body=in_use, name=name, results=results)


@dataclass(frozen=True)
class _InUse(HostBody):
    """The outputs in use of a function; what the others are is nobody's concern."""

    of: HostBody
    outputs: tuple[bool, ...]
    endpoints: Endpoints = field(default_factory=Endpoints)

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        return select(self.of(leaves), self.outputs)


def _like(operand: Any, shape: tuple[int, ...], how: Difference) -> jax.ShapeDtypeStruct:
    """The type of an operand at the perturbed points."""
    dtype = np.result_type(operand.dtype, np.complex64) if how.scheme == "complex_step" else operand.dtype
    return jax.ShapeDtypeStruct(shape, dtype)


def _unit_rows(rows: int, start: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """One row for each direction; those from `start` on are the unit vectors of an argument of that shape."""
    size = int(np.prod(shape))
    units = np.zeros((rows, size), dtype)
    units[start + np.arange(size), np.arange(size)] = 1
    return units.reshape(rows, *shape)
