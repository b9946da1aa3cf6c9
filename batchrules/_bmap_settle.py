"""When the cotangents of a loop's inputs are allocated: after the loop, not before it.

In reverse mode they start as arrays of zeros, which XLA likes to make at the very start of a program, where they
cost one whole array more. So the loop's result is settled together with the inputs that were spent on it. The
transpose of `settle` makes their cotangents' arrays, of contents that depend on the result's cotangent. What they hold
does not matter, because every element is written later: they are `blank`, and no derivative passes through that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching

from batchrules._bmap_partial import knows_the_first
from batchrules._bmap_primitives import define, first, is_zero, set_rules, zero_for
from batchrules._jax_versions import cast_varying, result_type, varying_axes

Blocks = tuple[int | None, ...]


def _settle_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, blocks: Blocks) -> tuple[Any, Any]:
    result = settle(*primals, blocks=blocks)
    if is_zero(tangents[0]):
        return result, tangents[0]
    moving = [not is_zero(t) for t in tangents]
    blocks = tuple(axis for axis, moves in zip(blocks, moving, strict=True) if moves)
    return result, settle(*(t for t, moves in zip(tangents, moving, strict=True) if moves), blocks=blocks)


def _settle_transpose(cotangent: Any, value: Any, *spent: Any, blocks: Blocks) -> list[Any]:
    if is_zero(cotangent):
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
        return lax.reshape(lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False), shape)

    nothing = cast_varying(lax.full(shape, 0, x.dtype), varying_axes(jax.typeof(x)))
    return lax.fori_loop(np.int32(0), np.int32(2), look, nothing)


def _as_dtype(x: Any, dtype: Any) -> Any:
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = lax.real(x)
    return lax.convert_element_type(x, dtype)


def _blank_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, aval: Any, blocks: Blocks) -> tuple[Any, Any]:
    (after,), (tangent,) = primals, tangents
    result = blank(after, aval, blocks=blocks)
    return result, zero_for(result) if is_zero(tangent) else blank(tangent, aval, blocks=blocks)


def _blank_transpose(_cotangent: Any, after: Any, **_params: Any) -> list[Any]:
    return [ad.Zero(after.aval)]


def _blank_batch(args: Sequence[Any], dims: Sequence[int], *, aval: Any, blocks: Blocks) -> tuple[Any, int]:
    (after,), (dim,) = args, dims
    after = batching.bdim_at_front(after, dim, after.shape[dim])
    spec = (jax.typeof(after).sharding.spec[0], *aval.sharding.spec)
    batched = result_type(aval, (after.shape[0], *aval.shape), aval.dtype, spec)
    return blank(after, batched, blocks=_shifted(blocks)), 0


_settle_p = define("bmap_settle", first, first)
_blank_p = define("bmap_blank", _blank_impl, lambda _after, *, aval, **_params: aval)
set_rules(_settle_p, _settle_jvp, _settle_batch, _settle_transpose)
knows_the_first(_settle_p)
set_rules(_blank_p, _blank_jvp, _blank_batch, _blank_transpose)


def settle(value: Any, *spent: Any, blocks: Blocks) -> Any:
    """The value. Its cotangent tells when the cotangents of the spent arrays may be allocated.

    `blocks` has the axis of value and spent arrays that may lie on several devices, if there is one.
    """
    return _settle_p.bind(value, *spent, blocks=blocks)


def blank(after: Any, aval: Any, *, blocks: Blocks) -> Any:
    """An array whose every element is written later, allocated no sooner than `after` is known."""
    return _blank_p.bind(after, aval=aval, blocks=blocks)
