"""What is left of an exchange whose result nothing uses: the carrier's tangent goes on to the next chunk.

See `_bmap_exchange`. A gradient does not need the results themselves, only how they depend on the inputs; with the
result goes the part that would be written, and a foreign call that it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import ad, batching

from batchrules._bmap_primitives import define, is_zero, pop, resized, set_rules, take, write, zero_for


def put(whole: Any, *, part: Any, start: Any, axis: int) -> Any:
    """A part written into a whole; tangents that are zero become arrays."""
    return write(ad.instantiate_zeros(whole), ad.instantiate_zeros(part), start, axis=axis)


def end(start: Any, size: int) -> Any:
    """Where the next chunk begins. After the last it is that again, because no slice goes past an array's end."""
    return lax.add(start, np.asarray(size, start.dtype))


def in_front(args: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Arrays with the dimension of a batch in front; those that lack it are repeated."""
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    return [batching.bdim_at_front(x, dim, size) for x, dim in zip(args, dims, strict=True)]


def without(marker: Any, dim: int | None) -> Any:
    """A marker without the dimension of a batch. All have the same value."""
    return marker if dim is None else lax.index_in_dim(marker, 0, dim, keepdims=False)


def next_part(carrier: Any, ahead: Any, *, axis: int, size: int) -> Any:
    """An array of the size of the next chunk: no one looks at its values. Only the first chunk may differ in size."""
    return ahead if ahead.shape[axis] == size else take(carrier, np.int32(0), axis=axis, size=size)


def _impl(*operands: Any, axis: int, size: int, step: int) -> list[Any]:
    del step
    carrier, ahead, marker, _ = operands
    return [carrier, next_part(carrier, ahead, axis=axis, size=size), marker]


def _abstract(*operands: Any, axis: int, size: int, step: int) -> list[Any]:
    del step
    carrier, ahead, marker, _ = operands
    return [carrier, resized(ahead, axis, size), marker]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, axis: int, size: int, step: int) -> tuple[Any, list[Any]]:
    d_carrier, _, d_marker, _ = tangents
    results = advance_p.bind(*primals, axis=axis, size=size, step=step)
    if is_zero(d_carrier):
        return results, [d_carrier, zero_for(results[1]), d_marker]
    d_ahead, d_carrier = pop(d_carrier, end(primals[3], step), axis=axis, size=size)
    return results, [d_carrier, d_ahead, d_marker]


def _transpose(cotangents: Sequence[Any], *operands: Any, axis: int, size: int, step: int) -> list[Any]:
    """Nothing is shared here: this is for programs that are linear as they stand, and no derivatives of others."""
    del size
    d_carrier, d_ahead, d_marker = cotangents
    ahead, start = operands[1], operands[3]
    if not (is_zero(d_carrier) and is_zero(d_ahead)):
        d_carrier = put(d_carrier, part=d_ahead, start=end(start, step), axis=axis)
    d_ahead = ad.Zero(ahead.aval) if ad.is_undefined_primal(ahead) else None
    asked = zip(operands[:3], (d_carrier, d_ahead, d_marker), strict=True)
    return [*(d if ad.is_undefined_primal(x) else None for x, d in asked), None]


def _batch(args: Sequence[Any], dims: Sequence[int | None], *, axis: int, size: int, step: int) -> tuple[Any, Any]:
    held = *in_front(args[:2], dims[:2]), without(args[2], dims[2])
    return advance_p.bind(*held, args[3], axis=axis + 1, size=size, step=step), [0, 0, None]


advance_p = define("bmap_advance", _impl, _abstract, multiple=True)
set_rules(advance_p, _jvp, _batch, _transpose)


def drop_result(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    """The rule of an exchange for results that nothing uses."""
    # Up to jax 0.10 the equation is the second argument, from 0.12 on the third.
    equation = rest[-1]
    count = len(equation.invars)
    if not any(used):
        return [False] * count, None
    if used[0]:
        return [True] * count, equation
    _, carrier, ahead, marker, part, start = equation.invars
    axis = equation.params["axis"]
    lean = equation.replace(
        primitive=advance_p,
        invars=[carrier, ahead, marker, start],
        outvars=equation.outvars[1:],
        params={**equation.params, "step": part.aval.shape[axis]},
    )
    return [False, True, True, True, False, True], lean


def size_along(x: Any, axis: int) -> int:
    """The size of an array, or of one that is not known yet, along an axis."""
    return (x.aval if ad.is_undefined_primal(x) else jax.typeof(x)).shape[axis]
