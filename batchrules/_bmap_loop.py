"""The loop over chunks.

A `Step` works on one chunk: `step(size, consts, state, parts) -> (state, results)`. The loop slices the parts out of
whole arrays, each along its own axis, and writes the results into whole arrays of their final shape. Nothing is
transposed, nothing is concatenated, and besides inputs and results only one chunk is in memory.

Its derivative is JAX's own, of one scan. What keeps that lean is how a mapped input goes in: its values are read from a
constant of the loop, without derivative, while its tangent travels through the loop's carry, as that of a `carrier`. A
constant's cotangent would be added up chunk by chunk, each time over the whole array; a carry's is written in place.
Where a result has the type of an input, both tangents are in one array: a chunk's is taken out, and the result's
written where it was. So are their cotangents, and no array is allocated for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from batchrules._bmap_exchange import begin, exchange, join, mark
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


class Carry(NamedTuple):
    """What goes from chunk to chunk. `carriers` are None for inputs without derivative.

    `ahead` and `markers` are those of the inputs that share an array with a result for their derivatives, by the
    inputs' numbers: the part of the carrier for the next chunk, and what tells whether the array is shared.
    """

    state: list[Any]
    results: list[Any]
    carriers: list[Any]
    ahead: dict[int, Any]
    markers: dict[int, Any]


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
        state, results = self._start(consts, state, fixed)
        shared = self._shared(carriers, results)
        carry = Carry(state, results, carriers, {}, {i: mark(fixed[i]) for i in shared})
        return self._settled(_Run(self, consts, fixed, shared).over_all(carry))

    def work(self, size: int, start: Any, inputs: tuple[Values, Values], state: Values, taken: Values) -> Any:
        """Run the step on the chunk that starts there."""
        consts, fixed = inputs
        parts = [take(x, start, axis=axis, size=size) for x, axis in zip(fixed, self.in_axes, strict=True)]
        parts = [x if carrier is None else graft(x, carrier) for x, carrier in zip(parts, taken, strict=True)]
        state, results = self.step(size, consts, state, parts)
        return list(state), list(results)

    def _start(self, consts: Values, state: Values, fixed: Values) -> tuple[list[Any], list[Any]]:
        """The state and the results before the first chunk, of the types that they have after it."""
        start = [*state, *(blank_like(r.whole) for r in self.results)]
        if any(is_placed(x) for x in (*consts, *state, *fixed)):
            work = partial(self.work, self.plan.size or self.plan.first)
            chunk = jax.make_jaxpr(work)(np.int32(0), (consts, fixed), state, [None] * len(fixed))
            start = placed_like(start, chunk.out_avals)
        return start[: len(state)], start[len(state) :]

    def _shared(self, carriers: Values, results: Values) -> dict[int, int]:
        """The inputs that share an array with a result of the same type: each one's number, with the result's."""
        shared: dict[int, int] = {}
        for j, (y, result) in enumerate(zip(results, self.results, strict=True)):
            for i, (x, axis) in enumerate(zip(carriers, self.in_axes, strict=True)):
                is_free = x is not None and i not in shared and j not in shared.values()
                if self.plan.count and is_free and axis == result.axis and jax.typeof(x) == jax.typeof(y):
                    shared[i] = j
        return shared

    def _settled(self, carry: Carry) -> tuple[Values, Values]:
        """The outputs, the first differentiable one of which says when the carriers' cotangents can be allocated."""
        outputs = [*carry.state, *carry.results]
        num_state = len(carry.state)
        # Where an axis was divided into blocks, they are the axis before the one that the loop slices.
        axes = [*[None] * num_state, *(r.axis - 1 if self.in_blocks else None for r in self.results)]
        spent = [
            (x, axis - 1 if self.in_blocks else None)
            for x, axis in zip(carry.carriers, self.in_axes, strict=True)
            if x is not None
        ]
        anchor = next((i for i, x in enumerate(outputs) if _is_differentiable(x)), None)
        if anchor is not None and spent:
            blocks = (axes[anchor], *(axis for _, axis in spent))
            outputs[anchor] = settle(outputs[anchor], *(x for x, _ in spent), blocks=blocks)
        return outputs[:num_state], outputs[num_state:]


@dataclass(frozen=True)
class _Run:
    """A loop with its arrays; `shared` has the inputs that share an array with a result, each with that result."""

    loop: Loop
    consts: Values
    fixed: Values
    shared: dict[int, int]

    def over_all(self, carry: Carry) -> Carry:
        """Run all chunks."""
        plan = self.loop.plan
        carry = self._begin(carry, plan.first or plan.size)
        if plan.first:
            carry = self._advance(plan.first, carry, np.int32(0))
        if plan.count:
            # Counted, and not read out of an array: less to trace and to compile.
            step = np.asarray(plan.size, plan.starts().dtype)

            def advance(held: tuple[Any, Carry], _: None) -> tuple[tuple[Any, Carry], None]:
                start, carry = held
                return (lax.add(start, step), self._advance(plan.size, carry, start)), None

            (_, carry), _ = lax.scan(advance, (plan.starts()[0], carry), None, length=plan.count)
        return self._joined(carry)

    def _advance(self, size: int, carry: Carry, start: Any) -> Carry:
        taken, carriers = self._take(carry, start, size)
        work = partial(self.loop.work, size)
        if self.loop.checkpoint:
            # The inputs are read in there: what is kept for a chunk is its number, not a copy of its inputs. Forward
            # and backward pass are two loops, so nothing can be shared between them by mistake.
            work = jax.checkpoint(work, prevent_cse=False)
        state, parts = work(start, (self.consts, self.fixed), carry.state, taken)
        carry = self._put(carry._replace(state=state, carriers=carriers), parts, start)
        if self.loop.on_chunk:
            self.loop.on_chunk(start)
        return carry

    def _take(self, carry: Carry, start: Any, size: int) -> tuple[list[Any], list[Any]]:
        """The chunk's part of each carrier, and the carriers."""
        taken, carriers = [carry.ahead.get(i) for i in range(len(carry.carriers))], list(carry.carriers)
        for i, (x, axis) in enumerate(zip(carriers, self.loop.in_axes, strict=True)):
            if x is not None and i not in self.shared:
                taken[i], carriers[i] = pop(x, start, axis=axis, size=size)
        return taken, carriers

    def _put(self, carry: Carry, parts: Values, start: Any) -> Carry:
        """Write the chunk's results."""
        results = list(carry.results)
        for j, (part, result) in enumerate(zip(parts, self.loop.results, strict=True)):
            if j not in self.shared.values():
                results[j] = write(results[j], part, start, axis=result.axis)
        held = {i: self._held(i, carry) for i in self.shared}
        for i, j in self.shared.items():
            held[i] = exchange(held[i], parts[j], start, axis=self.loop.in_axes[i], size=self.loop.plan.size)
        return self._hold(held, carry._replace(results=results))

    def _held(self, i: int, carry: Carry) -> list[Any]:
        """What an input and its result share."""
        return [carry.results[self.shared[i]], carry.carriers[i], carry.ahead[i], carry.markers[i]]

    def _hold(self, held: dict[int, list[Any]], carry: Carry) -> Carry:
        carry = Carry(carry.state, list(carry.results), list(carry.carriers), {}, {})
        for i, j in self.shared.items():
            carry.results[j], carry.carriers[i], carry.ahead[i], carry.markers[i] = held[i]
        return carry

    def _begin(self, carry: Carry, size: int) -> Carry:
        carriers, ahead = list(carry.carriers), dict(carry.ahead)
        for i in self.shared:
            ahead[i], carriers[i] = begin(carriers[i], axis=self.loop.in_axes[i], size=size)
        return carry._replace(carriers=carriers, ahead=ahead)

    def _joined(self, carry: Carry) -> Carry:
        """Each result with the derivative that stands in a carrier, which is then no carrier any more."""
        results, carriers = list(carry.results), list(carry.carriers)
        for i, j in self.shared.items():
            last, axis = self.loop.plan.starts()[-1], self.loop.in_axes[i]
            results[j], carriers[i] = join(self._held(i, carry), last, axis=axis), None
        return carry._replace(results=results, carriers=carriers)


def _is_differentiable(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
