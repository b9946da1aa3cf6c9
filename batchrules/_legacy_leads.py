"""Keep `legacy_vectorized` honest under nested vmaps of a registered primitive.

Each vmap binds the primitive anew. With `legacy_vectorized` an operand that the inner vmap does not map gets no
leading dimension; if an outer one maps it after all, it would lead with the outer size where the others lead with the
inner one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.interpreters import ad, batching, mlir

from batchrules._errors import BatchContractError
from batchrules._jax_versions import Primitive

# Passes on an operand that a bind got without a leading dimension, and refuses to be mapped.
without_lead_p = Primitive("batchrules_without_lead")
without_lead_p.def_impl(lambda operand, **_: operand)
without_lead_p.def_abstract_eval(lambda operand, **_: operand)
mlir.register_lowering(without_lead_p, lambda _ctx, operand, **_: [operand])


def _refuse_to_be_mapped(
    axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None], *, where: str
) -> tuple[Any, None]:
    del axis_data
    if dims[0] is None:
        return without_lead_p.bind(*operands, where=where), None
    raise BatchContractError(
        f"{where}: under 'legacy_vectorized' unmapped operands get no leading dimension, so nested vmaps over "
        "different operands would line up the wrong dimensions. Use 'expand_dims' or 'broadcast_all'."
    )


batching.fancy_primitive_batchers[without_lead_p] = _refuse_to_be_mapped


def _pass_the_tangent(primals: Sequence[Any], tangents: Sequence[Any], *, where: str) -> tuple[Any, Any]:
    return without_lead_p.bind(*primals, where=where), tangents[0]


ad.primitive_jvps[without_lead_p] = _pass_the_tangent
ad.primitive_transposes[without_lead_p] = lambda cotangent, _operand, **_: [cotangent]
