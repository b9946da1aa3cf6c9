"""Linear primitives that let a loop write parts of whole arrays and take them out, and transpose leanly.

JAX's own slices are linear too, but the transpose of a slice adds a whole array of zeros with one part filled in,
once for each chunk. These primitives say more: a chunk is written where nothing was written before, and taken out
once. So:

=========  ========================  ===============================================================
primitive  result                    its transpose
=========  ========================  ===============================================================
`write`    whole, holding the part   `pop`, from the whole's cotangent
`pop`      part, and the whole       `write`, into the whole's cotangent
`still`    its operand               nothing: it has no derivative
`graft`    its first operand         the second operand's cotangent, because its derivative is that one's
=========  ========================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla


def resized(aval: Any, axis: int, size: int) -> Any:
    """The type of a part of an array, of this size along the axis."""
    return aval.update(shape=(*aval.shape[:axis], size, *aval.shape[axis + 1 :]))


def first(value: Any, *_others: Any, **_params: Any) -> Any:
    """The first operand: the implementation, and the type, of a primitive that adds nothing to it."""
    return value


def _lower_first(_ctx: Any, value: Any, *_others: Any, **_params: Any) -> Any:
    return [value]


def define(name: str, impl: Callable[..., Any], abstract: Callable[..., Any], *, multiple: bool = False) -> Primitive:
    """A primitive of this implementation; `abstract` gives the types of its results."""
    primitive = Primitive(name)
    primitive.multiple_results = multiple
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    # What returns an operand need not be traced to be compiled.
    lowering = _lower_first if impl is first else mlir.lower_fun(impl, multiple_results=multiple)
    mlir.register_lowering(primitive, lowering)
    return primitive


def set_rules(primitive: Primitive, jvp: Any, batch: Any, transpose: Any) -> None:
    """Tell JAX how to differentiate, batch and transpose a primitive."""
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    ad.primitive_transposes[primitive] = transpose


def zero_for(value: Any) -> ad.Zero:
    """The tangent of a value that does not move."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def is_zero(value: Any) -> bool:
    """Whether a tangent or cotangent is known to be zero."""
    return isinstance(value, ad.Zero)


# --- write -----------------------------------------------------------------------------------------------------------


def overwritten(whole: Any, part: Any, start: Any, *, axis: int) -> Any:
    """The array with a part of it overwritten: what `write` does, where nothing will be differentiated."""
    # A start is never negative. Saying so spares a kernel that would count it from the end, to compile and to run.
    return lax.dynamic_update_slice_in_dim(whole, part, start, axis, allow_negative_indices=False)


def _write_impl(whole: Any, part: Any, start: Any, *, axis: int, apart: bool) -> Any:
    put = partial(overwritten, part=part, start=start, axis=axis)
    return _apart(put, whole) if apart else put(whole)


def _apart(work: Callable[[Any], Any], value: Any) -> Any:
    """Do work that can be done twice in a loop: XLA fuses it with nothing that is around."""
    return lax.fori_loop(np.int32(0), np.int32(2), lambda _, x: work(x), value)


def _write_abstract(whole: Any, _part: Any, _start: Any, **_params: Any) -> Any:
    return whole


def _write_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    (whole, part, start), (d_whole, d_part, _) = primals, tangents
    result = write(whole, part, start, **params)
    if is_zero(d_whole) and is_zero(d_part):
        return result, zero_for(result)
    return result, write(ad.instantiate_zeros(d_whole), ad.instantiate_zeros(d_part), start, **params)


def _write_transpose(cotangent: Any, *operands: Any, axis: int, apart: bool) -> tuple[Any, ...]:
    whole, part, start = operands
    if is_zero(cotangent):
        return (*(ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (whole, part)), None)
    size = (part.aval if ad.is_undefined_primal(part) else jax.typeof(part)).shape[axis]
    taken, rest = pop(cotangent, start, axis=axis, size=size, apart=apart)
    return rest if ad.is_undefined_primal(whole) else None, taken if ad.is_undefined_primal(part) else None, None


def _write_batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int, apart: bool) -> tuple[Any, int]:
    sizes = {x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None}
    size = sizes.pop()
    if dims[2] is not None:
        return jax.vmap(partial(_write_impl, axis=axis, apart=apart), tuple(dims), axis_size=size)(*args), 0
    whole, part = (batching.bdim_at_front(x, dim, size) for x, dim in zip(args[:2], dims[:2], strict=True))
    return write(whole, part, args[2], axis=axis + 1, apart=apart), 0


# --- pop -------------------------------------------------------------------------------------------------------------


def take(whole: Any, start: Any, *, axis: int, size: int) -> Any:
    """A part of an array, from a start that is not negative."""
    return lax.dynamic_slice_in_dim(whole, start, size, axis, allow_negative_indices=False)


def _pop_impl(whole: Any, start: Any, *, axis: int, size: int, apart: bool) -> list[Any]:
    part = partial(take, whole, start, axis=axis, size=size)
    return [_apart(lambda _: part(), lax.full_like(part(), 0)) if apart else part(), whole]


def _pop_abstract(whole: Any, _start: Any, *, axis: int, size: int, **_params: Any) -> list[Any]:
    return [resized(whole, axis, size), whole]


def _pop_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    (whole, start), (tangent, _) = primals, tangents
    results = pop(whole, start, **params)
    if is_zero(tangent):
        return results, [zero_for(x) for x in results]
    return results, pop(tangent, start, **params)


def _pop_transpose(cotangents: Sequence[Any], whole: Any, start: Any, **params: Any) -> tuple[Any, None]:
    del params["size"]
    d_part, d_rest = cotangents
    if is_zero(d_part) and is_zero(d_rest):
        return ad.Zero(whole.aval), None
    d_part, d_rest = ad.instantiate_zeros(d_part), ad.instantiate_zeros(d_rest)
    return write(d_rest, d_part, start, **params), None


def _pop_batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int, **params: Any) -> tuple[Any, list[int]]:
    (whole, start), (dim, start_dim) = args, dims
    if start_dim is not None:
        return jax.vmap(partial(_pop_impl, axis=axis, **params), (dim, start_dim))(whole, start), [0, 0]
    whole = batching.bdim_at_front(whole, dim, whole.shape[dim])
    return pop(whole, start, axis=axis + 1, **params), [0, 0]


# --- still -----------------------------------------------------------------------------------------------------------


def _still_jvp(primals: Sequence[Any], _tangents: Sequence[Any]) -> tuple[Any, Any]:
    return still(*primals), zero_for(primals[0])


def _still_transpose(_cotangent: Any, value: Any) -> list[Any]:
    return [ad.Zero(value.aval)]


def _still_batch(args: Sequence[Any], dims: Sequence[int]) -> tuple[Any, int]:
    return still(*args), dims[0]


# --- graft -----------------------------------------------------------------------------------------------------------


def _graft_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    return graft(*primals), tangents[1]


def _graft_transpose(cotangent: Any, value: Any, carrier: Any) -> list[Any]:
    return [
        ad.Zero(value.aval) if ad.is_undefined_primal(value) else None,
        cotangent if ad.is_undefined_primal(carrier) else None,
    ]


def _graft_batch(args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, int]:
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    return graft(*(batching.bdim_at_front(x, dim, size) for x, dim in zip(args, dims, strict=True))), 0


write_p = define("bmap_write", _write_impl, _write_abstract)
_pop_p = define("bmap_pop", _pop_impl, _pop_abstract, multiple=True)
_still_p = define("bmap_still", first, first)
_graft_p = define("bmap_graft", first, first)
set_rules(write_p, _write_jvp, _write_batch, _write_transpose)
set_rules(_pop_p, _pop_jvp, _pop_batch, _pop_transpose)
set_rules(_still_p, _still_jvp, _still_batch, _still_transpose)
set_rules(_graft_p, _graft_jvp, _graft_batch, _graft_transpose)


def write(whole: Any, part: Any, start: Any, *, axis: int, apart: bool = False) -> Any:
    """The array with the part written into it, where nothing was written before.

    `apart`, and so its transpose: compiled apart from what is around, which may otherwise need a copy of the array.
    """
    return write_p.bind(whole, part, start, axis=axis, apart=apart)


def pop(whole: Any, start: Any, *, axis: int, size: int, apart: bool = False) -> list[Any]:
    """A part of an array that is taken out only once, and the array to take the other parts from.

    `apart` is that of `write`.
    """
    return _pop_p.bind(whole, start, axis=axis, size=size, apart=apart)


def still(value: Any) -> Any:
    """The value, without derivative; unlike `stop_gradient`, in linear programs too."""
    return _still_p.bind(value)


def graft(value: Any, carrier: Any) -> Any:
    """The value, with the carrier's derivative. They are equal, but come from different places."""
    return _graft_p.bind(value, carrier)
