"""The tangent of an output that has none: an error once something uses it.

JAX asks for the tangents of all outputs, used or not, so the error must wait until the program is lowered, where
unused ones are gone, or until a cotangent arrives. Outside jit nothing is ever dropped; there the tangent is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from batchrules import _placement
from batchrules._errors import NotDifferentiableError
from batchrules._jax_versions import Primitive

_no_tangent_p = Primitive("batchrules_no_tangent")


def no_tangent(output: Any, tangents: Sequence[Any], label: str) -> Any:
    """A value like the output, linear in the tangents, that cannot be used."""
    return _no_tangent_p.bind(*_placement.aligned([jnp.zeros_like(output), *tangents]), label=label)


def _refuse(label: str) -> NotDifferentiableError:
    return NotDifferentiableError(
        f"{label} cannot be differentiated: its spec says differentiable=False. Return it from a function that you do "
        "not differentiate (close over its arguments), differentiate other outputs or arguments (argnums), or pass it "
        "through jax.lax.stop_gradient."
    )


@_no_tangent_p.def_abstract_eval
def _type(like: Any, *tangents: Any, label: str) -> Any:
    del tangents, label
    return like


@_no_tangent_p.def_impl
def _as_nan(like: Any, *tangents: Any, label: str) -> Any:
    del tangents, label
    return jnp.full_like(like, jnp.nan)


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, label: str) -> Any:
    del ctx, operands
    raise _refuse(label)


def _batch_rule(axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None], *, label: str) -> tuple[Any, int]:
    like, dim = operands[0], dims[0]
    moved = lax.broadcast(like, (axis_data.size,)) if dim is None else jnp.moveaxis(like, dim, 0)
    return _no_tangent_p.bind(moved, *operands[1:], label=label), 0


def _differentiate(primals: Sequence[Any], tangents: Sequence[Any], *, label: str) -> tuple[Any, Any]:
    moved = [ad.instantiate_zeros(tangent) for tangent in tangents[1:]]
    like = jnp.zeros_like(primals[0])
    return _no_tangent_p.bind(*primals, label=label), _no_tangent_p.bind(like, *moved, label=label)


def _transpose(cotangent: Any, *operands: Any, label: str) -> list[Any]:
    if not isinstance(cotangent, ad.Zero):
        raise _refuse(label)
    return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]


batching.fancy_primitive_batchers[_no_tangent_p] = _batch_rule
ad.primitive_jvps[_no_tangent_p] = _differentiate
ad.primitive_transposes[_no_tangent_p] = _transpose
mlir.register_lowering(_no_tangent_p, _lower)
