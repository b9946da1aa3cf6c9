"""The arrays that a loop writes its outputs into. Every element is written, so what they hold at first does not matter.

What matters is when and how they are allocated, because XLA likes to make constants at the very start of a program:

* A loop that runs backward follows one that ran forward. Arrays made before that one would be there all the while. So
  they are made of an element of something that is known only after it.
* Arrays of one constant would be made by copying the first, which takes longer than filling each with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from batchrules._bmap_frame import Frame
from batchrules._bmap_sharding import is_placed_explicitly, placed_like, plain_type
from batchrules._jax_versions import cast_varying, varying_axes


def arrays_for_results(frame: Frame, operands: Sequence[Any], types: Sequence[Any]) -> list[Any]:
    """An array for each result, of these types; None for those that are carried."""
    over = {j: i for i, j in frame.in_place}
    made: list[Any] = []
    for j, (kind, slot) in enumerate(zip(types, frame.outputs, strict=True)):
        if slot is None:
            made.append(None)
        elif j in over:
            # Not what it is computed from, which would be computed part by part, and be written over too soon.
            made.append(lax.optimization_barrier(operands[over[j]]))
        else:
            made += placed_like([_allocated(frame, j, operands, kind)], [kind])
    return made


def _allocated(frame: Frame, j: int, operands: Sequence[Any], kind: Any) -> Any:
    if frame.after is None:
        return filled(kind, j)
    after, known, new = operands[frame.after], frame.inputs[frame.after], frame.outputs[j]
    # Explicitly sharded arrays are left alone: an element of one lies on one device.
    if after.size == 0 or is_placed_explicitly(after):
        return filled(kind, j)
    kept = into = None
    if frame.in_blocks and known and new and new.segment is None:
        kept, into = known.axis - 1, new.axis - 1
    corner = _as_dtype(_corner(after, kept), kind.dtype)
    return lax.broadcast_in_dim(corner, kind.shape, () if into is None else (into,))


def filled(kind: Any, number: int = 0) -> Any:
    """An array of this type (a PRNG key's, where it is one), filled with a constant of its own for each number."""
    is_number = jnp.issubdtype(kind.dtype, jnp.inexact)
    return lax.full_like(plain_type(kind), number if is_number else 0)


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
