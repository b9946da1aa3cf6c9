"""Linear primitives that let a loop read and write parts of whole arrays, and still transpose leanly.

JAX's own slices are linear too, but the transpose of a slice adds a whole array of zeros with one part filled in,
once for each chunk. These primitives say more: a chunk is written where nothing was written before, and taken out
once. So:

=========  ========================  ===============================================================
primitive  result                    its transpose
=========  ========================  ===============================================================
`read`     part                      adds the part's cotangent to the whole, as JAX does
`write`    whole, holding the part   `pop`, from the whole's cotangent
`pop`      part, and the whole       `write`, into the whole's cotangent
`graft`    its first operand         none: its derivative is the second operand's
`settle`   its first operand         the first operand's cotangent, and a `blank` for each other operand
`blank`    a whole, contents unset   nothing: no later value depends on what it holds
=========  ========================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from batchrules._jax_versions import cast_varying, result_type, varying_axes

Blocks = tuple[int | None, ...]


def _resized(aval: Any, axis: int, size: int) -> Any:
    return aval.update(shape=(*aval.shape[:axis], size, *aval.shape[axis + 1 :]))


def _define(name: str, impl: Callable[..., Any], abstract: Callable[..., Any], *, multiple: bool = False) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = multiple
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=multiple))
    return primitive


def _first(value: Any, *_others: Any, **_params: Any) -> Any:
    return value


def _zero_for(value: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _is_zero(value: Any) -> bool:
    return isinstance(value, ad.Zero)


# --- read ------------------------------------------------------------------------------------------------------------


def _read_impl(whole: Any, start: Any, *, axis: int, size: int) -> Any:
    return lax.dynamic_slice_in_dim(whole, start, size, axis)


def _read_abstract(whole: Any, _start: Any, *, axis: int, size: int) -> Any:
    return _resized(whole, axis, size)


def _read_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: int) -> tuple[Any, Any]:
    (whole, start), (tangent, _) = primals, tangents
    part = read(whole, start, **params)
    if _is_zero(tangent):
        return part, _zero_for(part)
    return part, read(tangent, start, **params)


def _read_transpose(cotangent: Any, whole: Any, start: Any, **params: int) -> tuple[Any, None]:
    if _is_zero(cotangent):
        return ad.Zero(whole.aval), None
    return write(ad.instantiate_zeros(ad.Zero(whole.aval)), cotangent, start, axis=params["axis"]), None


def _read_batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int, size: int) -> tuple[Any, int]:
    (whole, start), (dim, start_dim) = args, dims
    if start_dim is not None:
        return jax.vmap(partial(_read_impl, axis=axis, size=size), (dim, start_dim))(whole, start), 0
    whole = batching.bdim_at_front(whole, dim, whole.shape[dim])
    return read(whole, start, axis=axis + 1, size=size), 0


# --- write -----------------------------------------------------------------------------------------------------------


def _write_impl(whole: Any, part: Any, start: Any, *, axis: int) -> Any:
    return lax.dynamic_update_slice_in_dim(whole, part, start, axis)


def _write_abstract(whole: Any, _part: Any, _start: Any, **_params: int) -> Any:
    return whole


def _write_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, axis: int) -> tuple[Any, Any]:
    (whole, part, start), (d_whole, d_part, _) = primals, tangents
    result = write(whole, part, start, axis=axis)
    if _is_zero(d_whole) and _is_zero(d_part):
        return result, _zero_for(result)
    return result, write(ad.instantiate_zeros(d_whole), ad.instantiate_zeros(d_part), start, axis=axis)


def _write_transpose(cotangent: Any, whole: Any, part: Any, start: Any, *, axis: int) -> tuple[Any, ...]:
    if _is_zero(cotangent):
        return (*(ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (whole, part)), None)
    size = (part.aval if ad.is_undefined_primal(part) else jax.typeof(part)).shape[axis]
    taken, rest = pop(cotangent, start, axis=axis, size=size)
    return rest if ad.is_undefined_primal(whole) else None, taken if ad.is_undefined_primal(part) else None, None


def _write_batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int) -> tuple[Any, int]:
    sizes = {x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None}
    size = sizes.pop()
    if dims[2] is not None:
        return jax.vmap(partial(_write_impl, axis=axis), tuple(dims), axis_size=size)(*args), 0
    whole, part = (batching.bdim_at_front(x, dim, size) for x, dim in zip(args[:2], dims[:2], strict=True))
    return write(whole, part, args[2], axis=axis + 1), 0


# --- pop -------------------------------------------------------------------------------------------------------------


def _pop_impl(whole: Any, start: Any, *, axis: int, size: int) -> list[Any]:
    return [lax.dynamic_slice_in_dim(whole, start, size, axis), whole]


def _pop_abstract(whole: Any, _start: Any, *, axis: int, size: int) -> list[Any]:
    return [_resized(whole, axis, size), whole]


def _pop_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: int) -> tuple[Any, Any]:
    (whole, start), (tangent, _) = primals, tangents
    results = pop(whole, start, **params)
    if _is_zero(tangent):
        return results, [_zero_for(x) for x in results]
    return results, pop(tangent, start, **params)


def _pop_transpose(cotangents: Sequence[Any], whole: Any, start: Any, *, axis: int, size: int) -> tuple[Any, None]:
    del size
    d_part, d_rest = cotangents
    if _is_zero(d_part) and _is_zero(d_rest):
        return ad.Zero(whole.aval), None
    return write(ad.instantiate_zeros(d_rest), ad.instantiate_zeros(d_part), start, axis=axis), None


def _pop_batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int, size: int) -> tuple[Any, list[int]]:
    (whole, start), (dim, start_dim) = args, dims
    if start_dim is not None:
        return jax.vmap(partial(_pop_impl, axis=axis, size=size), (dim, start_dim))(whole, start), [0, 0]
    whole = batching.bdim_at_front(whole, dim, whole.shape[dim])
    return pop(whole, start, axis=axis + 1, size=size), [0, 0]


# --- graft -----------------------------------------------------------------------------------------------------------


def _graft_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    return graft(*primals), tangents[1]


def _graft_batch(args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, int]:
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    return graft(*(batching.bdim_at_front(x, dim, size) for x, dim in zip(args, dims, strict=True))), 0


# --- settle and blank ------------------------------------------------------------------------------------------------


def _settle_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, blocks: Blocks) -> tuple[Any, Any]:
    result = settle(*primals, blocks=blocks)
    if _is_zero(tangents[0]):
        return result, tangents[0]
    moving = [not _is_zero(t) for t in tangents]
    blocks = tuple(axis for axis, moves in zip(blocks, moving, strict=True) if moves)
    return result, settle(*(t for t, moves in zip(tangents, moving, strict=True) if moves), blocks=blocks)


def _settle_transpose(cotangent: Any, value: Any, *spent: Any, blocks: Blocks) -> list[Any]:
    if _is_zero(cotangent):
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (value, *spent)]
    blanks = [
        blank(cotangent, x.aval, blocks=(blocks[0], axis)) if ad.is_undefined_primal(x) else None
        for x, axis in zip(spent, blocks[1:], strict=True)
    ]
    return [cotangent if ad.is_undefined_primal(value) else None, *blanks]


def _settle_batch(args: Sequence[Any], dims: Sequence[int | None], *, blocks: Blocks) -> tuple[Any, int]:
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    fronted = (batching.bdim_at_front(x, dim, size) for x, dim in zip(args, dims, strict=True))
    return settle(*fronted, blocks=_shifted(blocks)), 0


def _shifted(blocks: Blocks) -> Blocks:
    return tuple(None if axis is None else axis + 1 for axis in blocks)


def _blank_impl(after: Any, *, aval: Any, blocks: Blocks) -> Any:
    """An array with contents from `after`: XLA moves a constant to the program's start, and holds it from there on."""
    if after.size == 0 or any(axis is not None for axis in jax.typeof(after).sharding.spec):
        return lax.full(aval.shape, 0, aval.dtype)
    kept, into = blocks if None not in blocks else (None, None)
    corner = _as_dtype(_corner(after, kept), aval.dtype)
    return lax.broadcast_in_dim(corner, aval.shape, () if into is None else (into,))


def _corner(x: Any, kept: int | None) -> Any:
    """An element of `x`, or a row along the axis `kept`, which devices may hold a part of each.

    It is found by a loop, because XLA does not fuse one with what computes `x`, and so does not compute `x` twice.
    """
    sizes = [size if axis == kept else 1 for axis, size in enumerate(x.shape)]
    shape = () if kept is None else (x.shape[kept],)
    moving = next((axis for axis in range(x.ndim) if axis != kept), None)

    def look(i: Any, _found: Any) -> Any:
        starts = [i if axis == moving else lax.full_like(i, 0) for axis in range(x.ndim)]
        return lax.reshape(lax.dynamic_slice(x, starts, sizes), shape)

    nothing = cast_varying(lax.full(shape, 0, x.dtype), varying_axes(jax.typeof(x)))
    return lax.fori_loop(np.int32(0), np.int32(2), look, nothing)


def _as_dtype(x: Any, dtype: Any) -> Any:
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = lax.real(x)
    return lax.convert_element_type(x, dtype)


def _blank_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, aval: Any, blocks: Blocks) -> tuple[Any, Any]:
    (after,), (tangent,) = primals, tangents
    result = blank(after, aval, blocks=blocks)
    return result, _zero_for(result) if _is_zero(tangent) else blank(tangent, aval, blocks=blocks)


def _blank_transpose(_cotangent: Any, after: Any, **_params: Any) -> list[Any]:
    return [ad.Zero(after.aval)]


def _blank_batch(args: Sequence[Any], dims: Sequence[int], *, aval: Any, blocks: Blocks) -> tuple[Any, int]:
    (after,), (dim,) = args, dims
    after = batching.bdim_at_front(after, dim, after.shape[dim])
    spec = (jax.typeof(after).sharding.spec[0], *aval.sharding.spec)
    batched = result_type(aval, (after.shape[0], *aval.shape), aval.dtype, spec)
    return blank(after, batched, blocks=_shifted(blocks)), 0


_read_p = _define("bmap_read", _read_impl, _read_abstract)
_write_p = _define("bmap_write", _write_impl, _write_abstract)
_pop_p = _define("bmap_pop", _pop_impl, _pop_abstract, multiple=True)
_graft_p = _define("bmap_graft", _first, _first)
_settle_p = _define("bmap_settle", _first, _first)
_blank_p = _define("bmap_blank", _blank_impl, lambda _after, *, aval, **_params: aval)

ad.primitive_jvps[_graft_p] = _graft_jvp
batching.primitive_batchers[_graft_p] = _graft_batch

for _primitive, _jvp, _transpose, _batch in (
    (_read_p, _read_jvp, _read_transpose, _read_batch),
    (_write_p, _write_jvp, _write_transpose, _write_batch),
    (_pop_p, _pop_jvp, _pop_transpose, _pop_batch),
    (_settle_p, _settle_jvp, _settle_transpose, _settle_batch),
    (_blank_p, _blank_jvp, _blank_transpose, _blank_batch),
):
    ad.primitive_jvps[_primitive] = _jvp
    ad.primitive_transposes[_primitive] = _transpose
    batching.primitive_batchers[_primitive] = _batch


def read(whole: Any, start: Any, *, axis: int, size: int) -> Any:
    """A part of an array: `size` elements along `axis`, from `start` on."""
    return _read_p.bind(whole, start, axis=axis, size=size)


def write(whole: Any, part: Any, start: Any, *, axis: int) -> Any:
    """The array with the part written into it, where nothing was written before."""
    return _write_p.bind(whole, part, start, axis=axis)


def pop(whole: Any, start: Any, *, axis: int, size: int) -> list[Any]:
    """A part of an array that is taken out only once, and the array to take the other parts from."""
    return _pop_p.bind(whole, start, axis=axis, size=size)


def graft(value: Any, carrier: Any) -> Any:
    """The value, with the carrier's derivative. They are equal, but come from different places."""
    return _graft_p.bind(value, carrier)


def settle(value: Any, *spent: Any, blocks: Blocks) -> Any:
    """The value. Its cotangent tells when the cotangents of the spent arrays may be allocated.

    `blocks` has the axis of value and spent arrays that may lie on several devices, if there is one.
    """
    return _settle_p.bind(value, *spent, blocks=blocks)


def blank(after: Any, aval: Any, *, blocks: Blocks) -> Any:
    """An array whose every element is written later, allocated no sooner than `after` is known."""
    return _blank_p.bind(after, aval=aval, blocks=blocks)
