"""The loop over chunks.

A `Step` works on one chunk: `step(size, consts, state, parts) -> (state, results)`. The loop slices the parts out of
whole arrays, each along its own axis, and writes the results into whole arrays of their final shape. Nothing is
transposed, nothing is concatenated, and besides inputs and results only one chunk is in memory.

Its derivative is JAX's own, of one scan. What keeps that lean is how a mapped input goes in: its values are read from a
constant of the loop, without derivative, while its tangent travels through the loop's carry, as that of a `carrier`. A
constant's cotangent would be added up chunk by chunk, each time over the whole array; a carry's is written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from batchrules._bmap_primitives import graft, pop, still, take, write
from batchrules._bmap_settle import settle
from batchrules._bmap_sharding import blank_like, is_placed, placed_like

Values = Sequence[Any]
Step = Callable[[int, Values, Values, Values], tuple[Values, Values]]


@dataclass(frozen=True)
class ChunkPlan:
    """How an axis is cut: `first` elements at its start (perhaps none), then `count` chunks of `size`."""

    first: int
    size: int
    count: int

    @property
    def num_chunks(self) -> int:
        return self.count + (self.first > 0)

    def starts(self) -> np.ndarray:
        index_type = np.int32 if self.first + self.size * self.count < 2**31 else np.int64
        return self.first + self.size * np.arange(self.count, dtype=index_type)


def plan_one_chunk(axis_size: int) -> ChunkPlan:
    """All elements at once."""
    return ChunkPlan(axis_size, 0, 0)


def plan_chunks(axis_size: int, batch_size: int) -> ChunkPlan:
    """Equal chunks where few enough of them make up the axis, else full chunks after a smaller one.

    A smaller chunk is compiled on its own, and equal chunks are not, so a few chunks more are worth having.
    """
    fewest = -(-axis_size // batch_size)
    for count in range(fewest, 2 * fewest + 1):
        if axis_size % count == 0:
            return ChunkPlan(0, axis_size // count, count)
    return ChunkPlan(axis_size % batch_size, batch_size, axis_size // batch_size)


@dataclass(frozen=True)
class Result:
    """A stacked output: the whole array's type, and the axis it is written along."""

    whole: Any
    axis: int


@dataclass(frozen=True)
class Loop:
    """A loop over chunks, apart from the arrays. `in_axes` are the axes that inputs are sliced along."""

    step: Step
    plan: ChunkPlan
    in_axes: tuple[int, ...]
    results: tuple[Result, ...]
    in_blocks: bool
    checkpoint: bool
    on_chunk: Callable[[Any], None] | None

    def run(self, consts: Values, state: Values, wholes: Values) -> tuple[Values, Values]:
        """Run the step over all chunks: the last state, and the whole results."""
        fixed = [still(x) if _is_differentiable(x) else x for x in wholes]
        carriers = [x if _is_differentiable(x) else None for x in wholes]
        carry = (*self._start(consts, state, fixed), carriers)
        advance = partial(self._advance, consts, fixed)
        if self.plan.first:
            carry = advance(self.plan.first, carry, np.int32(0))
        if self.plan.count:
            carry, _ = lax.scan(lambda c, start: (advance(self.plan.size, c, start), None), carry, self.plan.starts())
        return self._settled(*carry)

    def _start(self, consts: Values, state: Values, fixed: Values) -> tuple[list[Any], list[Any]]:
        """The state and the results before the first chunk, of the types that they have after it."""
        start = [*state, *(blank_like(r.whole) for r in self.results)]
        if any(is_placed(x) for x in (*consts, *state, *fixed)):
            work = partial(self._work, self.plan.size or self.plan.first)
            chunk = jax.make_jaxpr(work)(np.int32(0), (consts, fixed), state, [None] * len(fixed))
            start = placed_like(start, chunk.out_avals)
        return start[: len(state)], start[len(state) :]

    def _advance(self, consts: Values, fixed: Values, size: int, carry: Any, start: Any) -> Any:
        state, results, carriers = carry
        taken, carriers = self._take(carriers, start, size)
        work = partial(self._work, size)
        if self.checkpoint:
            # The inputs are read in there: what is kept for a chunk is its number, not a copy of its inputs. Forward
            # and backward pass are two loops, so nothing can be shared between them by mistake.
            work = jax.checkpoint(work, prevent_cse=False)
        state, parts = work(start, (consts, fixed), state, taken)
        results = [write(x, y, start, axis=r.axis) for x, y, r in zip(results, parts, self.results, strict=True)]
        if self.on_chunk:
            self.on_chunk(start)
        return state, results, carriers

    def _take(self, carriers: Values, start: Any, size: int) -> tuple[list[Any], list[Any]]:
        pairs = [
            (None, None) if x is None else pop(x, start, axis=axis, size=size)
            for x, axis in zip(carriers, self.in_axes, strict=True)
        ]
        return [part for part, _ in pairs], [rest for _, rest in pairs]

    def _work(self, size: int, start: Any, inputs: tuple[Values, Values], state: Values, taken: Values) -> Any:
        consts, fixed = inputs
        parts = [take(x, start, axis=axis, size=size) for x, axis in zip(fixed, self.in_axes, strict=True)]
        parts = [x if carrier is None else graft(x, carrier) for x, carrier in zip(parts, taken, strict=True)]
        state, results = self.step(size, consts, state, parts)
        return list(state), list(results)

    def _settled(self, state: Values, results: Values, carriers: Values) -> tuple[Values, Values]:
        """The outputs, the first differentiable one of which says when the carriers' cotangents can be allocated."""
        outputs = [*state, *results]
        # Where an axis was divided into blocks, they are the axis before the one that the loop slices.
        axes = [*[None] * len(state), *(r.axis - 1 if self.in_blocks else None for r in self.results)]
        spent = [(x, axis - 1 if self.in_blocks else None) for x, axis in zip(carriers, self.in_axes, strict=True)]
        spent = [pair for pair in spent if pair[0] is not None]
        anchor = next((i for i, x in enumerate(outputs) if _is_differentiable(x)), None)
        if anchor is not None and spent:
            blocks = (axes[anchor], *(axis for _, axis in spent))
            outputs[anchor] = settle(outputs[anchor], *(x for x, _ in spent), blocks=blocks)
        return outputs[: len(state)], outputs[len(state) :]


def _is_differentiable(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
