"""Primitives by which a result and an input of the same type share one array for their derivatives.

A loop takes an input's tangent out of an array chunk by chunk, and writes a result's tangent into another. What was
taken is never read again, so the result's can be written there: one array instead of two, and the same for the
cotangents on the way back. Whether an input has a tangent is known only while JAX differentiates, so the choice is made
by the rules of these primitives, from which tangents are known to be zero:

==========  ==========================================  ===================================================
primitive   result                                      its derivative
==========  ==========================================  ===================================================
`begin`     the carrier's part for the first chunk      `pop`
`exchange`  the whole, holding the chunk's result       `write` into the carrier's tangent, `pop` of the
                                                        next part, and a marked marker; or, if the carrier
                                                        has no tangent, `write` into the whole's
`join`      the whole                                   the carrier's if the marker is marked, else the
                                                        whole's
`mark`      a scalar that is known by its tangent only  itself
==========  ==========================================  ===================================================

A chunk's part is taken out of the carrier right after the chunk before was written. So nothing reads the array between
that and the next writing; else XLA would copy the whole of it, each time. The values of carriers and their parts are
never looked at, only their tangents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from batchrules._bmap_advance import drop_result, end, in_front, next_part, put, size_along, without
from batchrules._bmap_partial import knows_apart, knows_the_first
from batchrules._bmap_primitives import (
    define,
    first,
    is_zero,
    overwritten,
    pop,
    resized,
    set_rules,
    take,
    write,
    zero_for,
)
from batchrules._jax_versions import cast_varying, result_type, varying_axes

# --- exchange --------------------------------------------------------------------------------------------------------


def _exchange_impl(*operands: Any, axis: int, size: int) -> list[Any]:
    whole, carrier, ahead, marker, part, start = operands
    ahead = next_part(carrier, ahead, axis=axis, size=size)
    # No primitives of our own in here: each would be traced and lowered in its turn.
    return [overwritten(whole, part, start, axis=axis), carrier, ahead, marker]


def _exchange_abstract(*operands: Any, axis: int, size: int) -> list[Any]:
    whole, carrier, ahead, marker = operands[:4]
    return [whole, carrier, resized(ahead, axis, size), marker]


def _exchange_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, axis: int, size: int) -> tuple[Any, list[Any]]:
    d_whole, d_carrier, _, d_marker, d_part, _ = tangents
    part, start = primals[4:]
    written = partial(put, part=d_part, start=start, axis=axis)
    results = _exchange_p.bind(*primals, axis=axis, size=size)
    if is_zero(d_carrier):
        still_zero = is_zero(d_whole) and is_zero(d_part)
        return results, [d_whole if still_zero else written(d_whole), d_carrier, zero_for(results[2]), d_marker]
    # A part that does not move is written all the same: the carrier's own tangent stands there.
    d_marker = d_marker if is_zero(d_part) else mark(d_carrier)
    d_ahead, d_carrier = pop(written(d_carrier), end(start, size_along(part, axis)), axis=axis, size=size)
    return results, [d_whole, d_carrier, d_ahead, d_marker]


def _exchange_transpose(cotangents: Sequence[Any], *operands: Any, axis: int, size: int) -> list[Any]:
    """Nothing is shared here: this is for programs that are linear as they stand, and no derivatives of others."""
    del size
    ahead, _, part, start = operands[2:]
    d_whole, d_carrier, d_ahead, d_marker = cotangents
    if not (is_zero(d_carrier) and is_zero(d_ahead)):
        d_carrier = put(d_carrier, part=d_ahead, start=end(start, size_along(part, axis)), axis=axis)
    d_part: Any = ad.Zero(part.aval) if ad.is_undefined_primal(part) else None
    if not is_zero(d_whole):
        d_part, d_whole = pop(d_whole, start, axis=axis, size=size_along(part, axis))
    d_ahead = ad.Zero(ahead.aval) if ad.is_undefined_primal(ahead) else None
    asked = zip(operands[:5], (d_whole, d_carrier, d_ahead, d_marker, d_part), strict=True)
    return [*(d if ad.is_undefined_primal(x) else None for x, d in asked), None]


def _exchange_batch(
    args: Sequence[Any], dims: Sequence[int | None], *, axis: int, size: int
) -> tuple[Any, list[int | None]]:
    whole, carrier, ahead, part = in_front((*args[:3], args[4]), (*dims[:3], dims[4]))
    held = whole, carrier, ahead, without(args[3], dims[3])
    return exchange(held, part, args[5], axis=axis + 1, size=size), [0, 0, 0, None]


# --- begin and join --------------------------------------------------------------------------------------------------


def _begin_impl(carrier: Any, *, axis: int, size: int) -> list[Any]:
    return [take(carrier, np.int32(0), axis=axis, size=size), carrier]


def _begin_abstract(carrier: Any, *, axis: int, size: int) -> list[Any]:
    return [resized(carrier, axis, size), carrier]


def _begin_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: int) -> tuple[Any, Any]:
    results, (tangent,) = _begin_p.bind(*primals, **params), tangents
    if is_zero(tangent):
        return results, [zero_for(x) for x in results]
    return results, pop(tangent, np.int32(0), **params, apart=True)


def _begin_transpose(cotangents: Sequence[Any], carrier: Any, *, axis: int, size: int) -> list[Any]:
    del size
    if all(is_zero(d) for d in cotangents):
        return [ad.Zero(carrier.aval)]
    d_part, d_rest = (ad.instantiate_zeros(d) for d in cotangents)
    return [write(d_rest, d_part, np.int32(0), axis=axis, apart=True)]


def _begin_batch(args: Sequence[Any], dims: Sequence[int], *, axis: int, size: int) -> tuple[Any, list[int]]:
    return begin(*in_front(args, dims), axis=axis + 1, size=size), [0, 0]


def _join_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, axis: int) -> tuple[Any, Any]:
    d_whole, d_carrier, d_ahead, d_marker, _ = tangents
    result = _join_p.bind(*primals, axis=axis)
    if is_zero(d_marker):
        return result, d_whole
    # The part ahead is the last chunk's own, and stands there already. On the way back, the first part is taken here.
    d_carrier = write(d_carrier, ad.instantiate_zeros(d_ahead), primals[4], axis=axis, apart=True)
    return result, d_carrier if is_zero(d_whole) else ad.add_tangents(d_whole, d_carrier)


def _join_transpose(cotangent: Any, *operands: Any, **_params: int) -> list[Any]:
    whole, *others = operands
    nothing = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in others]
    return [cotangent if ad.is_undefined_primal(whole) else None, *nothing]


def _join_batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int) -> tuple[Any, int]:
    held = *in_front(args[:3], dims[:3]), without(args[3], dims[3])
    return join(held, args[4], axis=axis + 1), 0


# --- mark ------------------------------------------------------------------------------------------------------------


def _mark_impl(value: Any) -> Any:
    return cast_varying(lax.full((), 0, value.dtype), varying_axes(jax.typeof(value)))


def _mark_abstract(value: Any) -> Any:
    return result_type(value, (), value.dtype, ())


def _mark_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    result = mark(*primals)
    return result, zero_for(result) if is_zero(tangents[0]) else mark(tangents[0])


def _mark_transpose(_cotangent: Any, value: Any) -> list[Any]:
    return [ad.Zero(value.aval)]


def _mark_batch(args: Sequence[Any], _dims: Sequence[int]) -> tuple[Any, None]:
    return mark(*args), None


_exchange_p = define("bmap_exchange", _exchange_impl, _exchange_abstract, multiple=True)
_begin_p = define("bmap_begin", _begin_impl, _begin_abstract, multiple=True)
_join_p = define("bmap_join", first, first)
_mark_p = define("bmap_mark", _mark_impl, _mark_abstract)
set_rules(_exchange_p, _exchange_jvp, _exchange_batch, _exchange_transpose)
pe.dce_rules[_exchange_p] = drop_result
knows_apart(_exchange_p)
set_rules(_begin_p, _begin_jvp, _begin_batch, _begin_transpose)
set_rules(_join_p, _join_jvp, _join_batch, _join_transpose)
knows_the_first(_join_p)
set_rules(_mark_p, _mark_jvp, _mark_batch, _mark_transpose)


def exchange(held: Sequence[Any], part: Any, start: Any, *, axis: int, size: int) -> list[Any]:
    """Whole, carrier, the carrier's part for the next chunk (of this size), and marker, after the part was written."""
    return _exchange_p.bind(*held, part, start, axis=axis, size=size)


def begin(carrier: Any, *, axis: int, size: int) -> list[Any]:
    """The carrier's part for the first chunk, and the carrier."""
    return _begin_p.bind(carrier, axis=axis, size=size)


def join(held: Sequence[Any], last: Any, *, axis: int) -> Any:
    """The whole, with the carrier's tangent if the marker says that it is there; the last part begins at `last`."""
    return _join_p.bind(*held, last, axis=axis)


def mark(value: Any) -> Any:
    """A zero of the value's dtype, which has a tangent if the value has one."""
    return _mark_p.bind(value)
