"""Derivatives of one element, compared with differences of calls, and forward with reverse mode.

Central differences with a step and with twice that: their distance tells how far they can be trusted. Source:
Press et al., Numerical Recipes, 3rd edition, section 5.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from batchrules import _precision
from batchrules._testing_comparisons import largest, ratio, shown, wide
from batchrules._testing_derivatives import Derivatives, direction
from batchrules._testing_leaves import Array, Leaf
from batchrules._testing_run import Target

_RTOL = {64: 1e-5, 32: 1e-2}
_ROUNDING = 10.0
# Differences that are less certain than this share of their size say nothing.
_USELESS = 0.2
_DIRECTIONS = 3


@dataclass(frozen=True)
class Finding:
    """A derivative of one element that is wrong.

    Attributes:
        mode: The transformation: "jvp", "vjp", "jacfwd", "jacrev".
        cause: What is wrong, in words.
        evidence: What came, and what was wanted.
        values: The arguments.
    """

    mode: str
    cause: str
    evidence: str
    values: tuple[Array, ...]


@dataclass(frozen=True)
class Slope:
    """The derivative of the seen outputs along one direction in one leaf, and how uncertain it is."""

    leaf: int
    tangent: Array
    outputs: list[Array]
    errors: list[float]
    rtol: float

    @property
    def certain(self) -> bool:
        """Whether it can prove anything."""
        pairs = zip(self.outputs, self.errors, strict=True)
        return all(np.isfinite(o).all() and error <= _USELESS * max(largest([o]), 1e-30) + 1e-9 for o, error in pairs)

    def bound(self, output: int) -> float:
        """How far a derivative may be from it."""
        return self.rtol * largest([self.outputs[output]]) + self.errors[output]


@dataclass(frozen=True, eq=False)
class Numeric:
    """Differences of the one-element calls of a target."""

    derivatives: Derivatives

    @property
    def base(self) -> Target:
        """The function itself."""
        return self.derivatives.base

    @property
    def coarse(self) -> str | None:
        """The dtype that is too coarse for differences, if there is one."""
        for array in self._arrays:
            if _precision.bits(array.dtype) < 32:
                return str(array.dtype)
        return None

    @property
    def _arrays(self) -> list[Array]:
        part, space = self.derivatives.part, self.derivatives.space
        return [*(self.base.leaves[i].value for i in part.moving), *(space.outputs[o] for o in part.seen)]

    @property
    def elements(self) -> list[tuple[Array, ...]]:
        """Two points: the example, and another."""
        return [tuple(leaf.variant(number) for leaf in self.base.leaves) for number in (0, 1)]

    def tangents(self, leaf: int) -> list[Array]:
        """Directions in which a leaf is moved."""
        like = self.base.leaves[leaf]
        return [direction(like, "", leaf, self.derivatives.seed + i).value for i in range(_DIRECTIONS)]

    def slope(self, values: Sequence[Array], leaf: int, tangent: Array) -> Slope:
        """Differences of calls, along a direction in one leaf."""
        epsilon = max(_precision.epsilon(array.dtype) for array in self._arrays)
        rtol = max(_RTOL[32 if epsilon > 1e-10 else 64], self.base.tolerance.rtol or 0.0)
        step = epsilon ** (1 / 3)
        at = {k: self._seen(values, leaf, tangent, k * step) for k in (0, 1, -1, 2, -2)}
        outputs, errors = [], []
        for here, up, down, far_up, far_down in zip(at[0], at[1], at[-1], at[2], at[-2], strict=True):
            near, far = (up - down) / (2 * step), (far_up - far_down) / (4 * step)
            bend = (up - 2 * here + down) / (2 * step)
            rounding = _ROUNDING * epsilon * largest([here, up, down, far_up, far_down]) / step
            outputs.append(near + (near - far) / 3)
            errors.append(largest([near - far]) + largest([bend]) + rounding)
        return Slope(leaf, tangent, outputs, errors, rtol)

    def _seen(self, values: Sequence[Array], leaf: int, tangent: Array, step: float) -> list[Array]:
        moved = list(values)
        moved[leaf] = (wide(values[leaf]) + step * wide(tangent)).astype(values[leaf].dtype)
        outputs = self.base.at(moved) if step else self.base.at(values)
        return [wide(outputs[o]) for o in self.derivatives.part.seen]


def _zeros(leaves: Sequence[Leaf]) -> list[Array]:
    return [np.zeros_like(leaf.value) for leaf in leaves]


def slopes(numeric: Numeric, leaf: int) -> Iterator[tuple[tuple[Array, ...], Slope]]:
    """At each point, along each direction in a leaf."""
    for values in numeric.elements:
        for tangent in numeric.tangents(leaf):
            yield values, numeric.slope(values, leaf, tangent)


def check_jvp(numeric: Numeric, leaf: int, known: Sequence[Any]) -> Finding | None:
    """Compare the tangents of one leaf with differences."""
    target = numeric.derivatives.jvp()[0]
    name, place = numeric.base.leaves[leaf].name, numeric.derivatives.part.moving.index(leaf)
    for values, slope in known:
        tangents = _zeros(target.leaves[len(values) :])
        tangents[place] = slope.tangent
        got = target.at([*values, *tangents])
        finding = _compare_jvp(got, slope, name, values, numeric)
        if finding is not None:
            return finding
    return None


def _compare_jvp(
    got: Sequence[Array], slope: Slope, name: str, values: tuple[Array, ...], numeric: Numeric
) -> Finding | None:
    for place, (pushed, wanted) in enumerate(zip(got, slope.outputs, strict=True)):
        gap = wide(pushed) - wanted
        if np.isfinite(gap).all() and largest([gap]) <= slope.bound(place):
            continue
        output = numeric.base.outputs[numeric.derivatives.part.seen[place]]
        times = ratio(wide(pushed), wanted)
        if not np.any(pushed):
            said = f"the jvp leaves out the tangent of {name}: a term is missing, and {output} does not move"
        elif times is not None:
            said = f"the jvp of {name} is {times:.4g} times the numerical derivative"
        else:
            said = f"the jvp of {name} is not the numerical derivative: a term is missing or wrong"
        evidence = (
            f"tangent of {name}: {shown(slope.tangent)}\n"
            f"tangent of {output}: got {shown(pushed)}\nwanted {shown(wanted)} (central differences of calls)"
        )
        return Finding("jvp", said, evidence, values)
    return None


def check_vjp(numeric: Numeric, leaf: int, known: Sequence[Any]) -> Finding | None:
    """Compare the cotangent of one leaf, along directions, with differences."""
    target = numeric.derivatives.vjp()[0]
    name, part = numeric.base.leaves[leaf].name, numeric.derivatives.part
    for place, output in enumerate(part.seen):
        rows = [_pulled(target, numeric, (leaf, place), values, slope) for values, slope in known]
        wrong = [row for row in rows if not abs(row.got - row.wanted) <= row.bound]
        if not wrong:
            continue
        said = _said_of_vjp(name, numeric.base.outputs[output], rows)
        row = wrong[0]
        evidence = (
            f"cotangent of {numeric.base.outputs[output]}: {shown(row.cotangent)}, direction in {name}: "
            f"{shown(row.tangent)}\ncotangent · derivative along it: got {row.got:.6g}, wanted {row.wanted:.6g} "
            "(central differences of calls)"
        )
        return Finding("vjp", said, evidence, row.values)
    return None


@dataclass(frozen=True)
class _Row:
    """The vjp, contracted with a direction, and what it should be."""

    got: float
    wanted: float
    bound: float
    cotangent: Array
    tangent: Array
    values: tuple[Array, ...]


def _pulled(target: Target, numeric: Numeric, place: tuple[int, int], values: Any, slope: Slope) -> _Row:
    leaf, output = place
    leaves = target.leaves[len(values) :]
    cotangents = _zeros(leaves)
    cotangents[output] = leaves[output].value
    pulled = target.at([*values, *cotangents])[numeric.derivatives.part.moving.index(leaf)]
    cotangent = wide(cotangents[output])
    got = _paired(wide(pulled), wide(slope.tangent))
    wanted = _paired(cotangent, slope.outputs[output])
    bound = slope.bound(output) * float(np.abs(cotangent).sum())
    return _Row(got, wanted, bound, cotangents[output], slope.tangent, values)


def _said_of_vjp(name: str, output: str, rows: Sequence[_Row]) -> str:
    got, wanted = np.array([row.got for row in rows]), np.array([row.wanted for row in rows])
    times = ratio(got, wanted)
    if not np.any(got):
        return f"the vjp of {name} is zero, yet {output} depends on {name}: a term is missing"
    if times is not None:
        return f"the vjp of {name} is {times:.4g} times the numerical derivative"
    return f"the vjp of {name} is not the numerical derivative: a term is missing or wrong"


def _paired(cotangent: Array, tangent: Array) -> float:
    """JAX does not conjugate cotangents."""
    return float(np.real(np.sum(cotangent * tangent)))


def check_linear(numeric: Numeric) -> Finding | None:
    """All tangents together must give the sum of what each gives alone."""
    target = numeric.derivatives.jvp()[0]
    for values in numeric.elements:
        tangents = [leaf.value for leaf in target.leaves[len(values) :]]
        together = target.at([*values, *tangents])
        total = [np.zeros(array.shape, wide(array).dtype) for array in together]
        for place, tangent in enumerate(tangents):
            alone = _zeros(target.leaves[len(values) :])
            alone[place] = tangent
            total = [so_far + wide(a) for so_far, a in zip(total, target.at([*values, *alone]), strict=True)]
        for got, wanted in zip(together, total, strict=True):
            noise = largest([*tangents, wanted])
            if not target.tolerance.close(got, wanted.astype(got.dtype), noise).all():
                evidence = f"all together: {shown(got)}\nsum of each alone: {shown(wanted)}"
                return Finding("jvp", "the jvp is not linear in the tangents", evidence, values)
    return None


def check_adjoint(numeric: Numeric) -> Finding | None:
    """Forward and reverse mode must be each other's transpose: ct · (J t) is (Jᵀ ct) · t."""
    forward, reverse = numeric.derivatives.jvp()[0], numeric.derivatives.vjp()[0]
    for values in numeric.elements:
        tangents = [leaf.value for leaf in forward.leaves[len(values) :]]
        cotangents = [leaf.value for leaf in reverse.leaves[len(values) :]]
        pushed = forward.at([*values, *tangents])
        pulled = reverse.at([*values, *cotangents])
        ahead = [wide(c) * wide(p) for c, p in zip(cotangents, pushed, strict=True)]
        back = [wide(p) * wide(t) for p, t in zip(pulled, tangents, strict=True)]
        left, right = (float(sum(np.real(np.sum(term)) for term in terms)) for terms in (ahead, back))
        size = float(sum(np.sum(np.abs(term)) for term in (*ahead, *back)))
        coarsest = max((array.dtype for array in [*pushed, *pulled]), key=_precision.epsilon)
        close = forward.tolerance.close(np.array(left), np.array(right)).all()
        if not close and abs(left - right) > size * _relative(coarsest):
            said = "jvp and vjp disagree: they are not each other's transpose"
            evidence = f"cotangent · (J tangent) = {left:.6g}\n(Jᵀ cotangent) · tangent = {right:.6g}"
            return Finding("vjp", said, evidence, values)
    return None


def _relative(dtype: np.dtype[Any]) -> float:
    return min(1e4 * _precision.epsilon(dtype), 0.1)


def check_jacobian(numeric: Numeric, mode: str) -> Finding | None:
    """A Jacobian must be what jvp gives tangent by tangent, or vjp cotangent by cotangent."""
    forward = mode == "jacfwd"
    derivatives = numeric.derivatives
    target = derivatives.jacobian(mode, jax.jacfwd if forward else jax.jacrev)[0]
    single = (derivatives.jvp() if forward else derivatives.vjp())[0]
    values = numeric.elements[1]
    more = [leaf.value for leaf in single.leaves[len(values) :]]
    wanted = single.at([*values, *more])
    blocks = _contracted(target.at(values), more, len(wanted), forward=forward)
    for got, right, name in zip(blocks, wanted, single.outputs, strict=True):
        if not target.tolerance.close(got.astype(right.dtype), right, largest([*more, right])).all():
            kind = "jvp" if forward else "vjp"
            said = (
                f"jax.{mode} is not what {kind} gives one by one: a batch of {kind}s over unmapped arguments is wrong"
            )
            evidence = f"{name}: got {shown(got)} (by {mode})\nwanted {shown(right)} (by {kind})"
            return Finding(mode, said, evidence, values)
    return None


def _contracted(blocks: Sequence[Array], more: Sequence[Array], count: int, *, forward: bool) -> list[Array]:
    """The blocks times the tangents, or the cotangents times the blocks."""
    outs, ins = (count, len(more)) if forward else (len(more), count)
    totals: list[Any] = [0.0] * count
    for i in range(outs):
        for j in range(ins):
            block = wide(blocks[i * ins + j])
            if forward:
                totals[i] = totals[i] + np.tensordot(block, wide(more[j]), axes=more[j].ndim)
            else:
                totals[j] = totals[j] + np.tensordot(wide(more[i]), block, axes=more[i].ndim)
    return [np.asarray(total) for total in totals]
