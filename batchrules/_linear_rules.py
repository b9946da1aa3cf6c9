"""The derivative rules of an opaque primitive, host or device: its jvp, its transpose, and what may be dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from batchrules import _batch, _derivatives, _placement
from batchrules._batch import Axes, OutAxis
from batchrules._errors import NotDifferentiableError
from batchrules._no_tangent import no_tangent
from batchrules._recording import Result
from batchrules._sites import Site, fill, select


def install(primitive: Any) -> None:
    """Give a primitive whose parameters are `site` and `axes` its derivative rules."""
    rules = _Rules(primitive)
    ad.primitive_jvps[primitive] = rules.differentiate
    ad.primitive_transposes[primitive] = rules.transpose
    pe.dce_rules[primitive] = rules.drop_unused


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero, as that of an integer always is."""
    return isinstance(tangent, ad.Zero) or jax.typeof(tangent).dtype == jax.dtypes.float0


class _Rules:
    def __init__(self, primitive: Any) -> None:
        self._primitive = primitive

    def _bind(self, operands: Sequence[Any], site: Site, axes: Axes) -> Sequence[Any]:
        return self._primitive.bind(*_placement.aligned(operands), site=site, axes=axes)

    def differentiate(
        self, primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, axes: Axes
    ) -> tuple[Sequence[Any], list[Any]]:
        nonzero = [not is_zero(tangent) for tangent in tangents]
        fixed = len(primals) - site.linear
        moves = any(nonzero[:fixed]) and any(_derivatives.inexact_outputs(site))
        if moves:
            site.check_differentiable()
            _refuse_arguments(site, nonzero[:fixed])
        outputs = self._primitive.bind(*primals, site=site, axes=axes)
        parts = []
        if any(nonzero[fixed:]):
            # In its tangents or cotangents a derived site is its own derivative.
            moved = [ad.instantiate_zeros(tangent) for tangent in tangents[fixed:]]
            parts.append(self._bind([*primals[:fixed], *moved], site, axes))
        if moves:
            mask = (*nonzero[:fixed], *[False] * site.linear)
            parts.append(self._tangents([*primals], outputs, select(tangents, mask), (site, axes, mask)))
        return outputs, _output_tangents(outputs, parts, site, select(tangents, nonzero))

    def _tangents(
        self, primals: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any], place: tuple[Any, Axes, Any]
    ) -> Sequence[Any]:
        site, axes, mask = place
        wanted = _derivatives.inexact_outputs(site)
        derived = _derivatives.tangent_site(site, mask, wanted)
        passed = self._passed(primals, outputs, site, axes)
        new_axes = _derivatives.differentiated_axes(axes, site.passed, mask, wanted)
        return self._bind([*primals, *passed, *tangents], derived, new_axes)

    def _passed(self, primals: Sequence[Any], outputs: Sequence[Any], site: Site, axes: Axes) -> Sequence[Any]:
        """The outputs that the derivative is given: of each element, not their sum over a batch."""
        if not site.passed:
            return []
        each = _batch.unsummed(axes)
        return site.shown(outputs if each == axes else self._primitive.bind(*primals, site=site, axes=each))

    def transpose(self, cotangents: Sequence[Any], *operands: Any, site: Site, axes: Axes) -> list[Any]:
        wanted = tuple(ad.is_undefined_primal(operand) for operand in operands)
        seen = [j for j, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)]
        given: list[Any] = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
        if not seen:
            return given
        fixed = len(operands) - site.linear
        transposed = _derivatives.transposed_site(
            site,
            wanted[fixed:],
            tuple(j in seen for j in range(len(cotangents))),
            [_as_element(x, axes, i) for i, x in enumerate(operands[: _operands_of_base(site)])],
        )
        asked = _asked(site, transposed, wanted, fixed)
        new_axes = _derivatives.transposed_axes(axes, fixed, seen, asked)
        spread = [_spread(cotangents[j], axes, j) for j in seen]
        outputs = self._bind([*operands[:fixed], *spread], transposed, new_axes)
        for operand, output in zip(asked, outputs, strict=True):
            if operand is not None:
                given[operand] = output
        return given

    def drop_unused(self, used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
        # Up to jax 0.10 the equation is the second argument, from 0.12 on the third.
        equation = rest[-1]
        count = len(equation.invars)
        if not any(used):
            return [False] * count, None
        site = equation.params["site"]
        if all(used) or site.origin is None:
            return [True] * count, equation
        mask = tuple(used)
        narrowed = {
            "site": _derivatives.narrowed(site, mask),
            "axes": _derivatives.narrowed_axes(equation.params["axes"], mask),
        }
        kept = select(equation.outvars, mask)
        return [True] * count, equation.replace(outvars=kept, params={**equation.params, **narrowed})


def _operands_of_base(site: Site) -> int:
    return 0 if site.origin is None else len(site.origin.primals)


def _refuse_arguments(site: Site, nonzero: Sequence[bool]) -> None:
    """Raise if an argument that the schema calls non-differentiable has a tangent."""
    schema = site.request.schema
    if schema is None:
        return
    for path in select(site.paths[: len(nonzero)], nonzero):
        spec = schema.get(path)
        if spec is not None and not spec.differentiable:
            raise NotDifferentiableError(
                f"{site.name} cannot be differentiated with respect to {path!r}: its schema says differentiable=False. "
                "Close over it, so that it is no argument of what you differentiate; or name the others with argnums; "
                "or pass it through jax.lax.stop_gradient."
            )


def _output_tangents(
    outputs: Sequence[Any], parts: Sequence[Sequence[Any]], site: Site, moved: Sequence[Any]
) -> list[Any]:
    """The sum of the parts for differentiable outputs, zero for those that are not numbers with a derivative."""
    summed = iter([sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)])
    differentiable = _derivatives.inexact_outputs(site)
    return [
        next(summed) if parts and is_differentiable else _no_derivative(site, j, output, moved)
        for j, (output, is_differentiable) in enumerate(zip(outputs, differentiable, strict=True))
    ]


def _no_derivative(site: Site, output: int, value: Any, moved: Sequence[Any]) -> Any:
    zero = ad.Zero(jax.typeof(value).to_tangent_aval())
    is_discrete = not jnp.issubdtype(jax.typeof(value).dtype, jnp.inexact)
    result = site.results[output]
    if not moved or result.differentiable or is_discrete:
        return zero
    return no_tangent(value, moved, f"{site.name}: output {result.path or output!r}")


def _asked(site: Site, transposed: Site, wanted: Sequence[bool], fixed: int) -> list[int | None]:
    """For each output of a transposed site, the operand whose cotangent it is, if that is wanted."""
    linear = range(fixed, fixed + site.linear)
    if transposed.is_cotangent:
        return [i for i in linear if wanted[i]]
    # A tangent site gives every output of its base; the operands were the cotangents of some of these.
    origin = transposed.origin
    given = site.origin.outputs if site.origin else ()
    operands = fill(given, linear, [None] * len(given))
    outputs = origin.outputs if origin else ()
    return [i if i is not None and wanted[i] else None for i in select(operands, outputs)]


def _as_element(operand: Any, axes: Axes, position: int) -> Result:
    aval = operand.aval if ad.is_undefined_primal(operand) else jax.typeof(operand)
    return Result("", _batch.element_shape(axes, position, aval.shape), aval.dtype)


def _spread(cotangent: Any, axes: Axes, output: int) -> Any:
    """The cotangent of an output, given to the first element only of each axis that the output does not depend on."""
    position = 0
    for axis in axes:
        if axis.output(output) is OutAxis.ABSENT:
            lead = lax.expand_dims(cotangent, (position,))
            padding = [(0, 0, 0)] * lead.ndim
            padding[position] = (0, axis.size - 1, 0)
            cotangent = lax.pad(lead, jnp.zeros((), lead.dtype), padding)
        if axis.output(output) is not OutAxis.SUMMED:
            position += 1
    return cotangent
