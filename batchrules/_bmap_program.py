"""From one element's program to the whole result: the loop's step, and what becomes of each output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.sharding import NamedSharding

import batchrules._bmap_batching  # gives the loop a rule
import batchrules._bmap_forward  # the same
import batchrules._bmap_reverse  # noqa: F401  # the same
from batchrules._bmap_allocate import filled
from batchrules._bmap_collectives import ChunkedAxis
from batchrules._bmap_frame import Frame, Slot
from batchrules._bmap_loop import loop
from batchrules._bmap_plan import ChunkPlan
from batchrules._bmap_reduce import Reduction
from batchrules._bmap_sharding import divided_over, plain_type, spread_along_first
from batchrules._bmap_trace import Element, Shared

Values = Sequence[Any]


@dataclass(frozen=True)
class Layout:
    """How the mapped axis is laid out: `size` elements, in equal blocks that every chunk takes a part of each of.

    One block is the plain axis. With more, an array's mapped axis becomes two: the blocks, and what is in one. Where
    each block is known to lie on a device of its own (`over` says how), reductions have a state for each, so that
    the devices need not meet for each chunk.
    """

    size: int
    blocks: int = 1
    over: NamedSharding | None = None

    def divide(self, x: Any, axis: int) -> Any:
        """A whole array, or a chunk, with its mapped axis as two."""
        if self.blocks == 1:
            return x
        return lax.reshape(x, (*x.shape[:axis], self.blocks, x.shape[axis] // self.blocks, *x.shape[axis + 1 :]))

    def unite(self, x: Any, axis: int) -> Any:
        """The inverse of `divide`."""
        if self.blocks == 1:
            return x
        return lax.reshape(x, (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]))

    def loop_axis(self, axis: int) -> int:
        """The axis that the loop slices, when the mapped axis is `axis`."""
        return axis if self.blocks == 1 else axis + 1


@dataclass(frozen=True)
class Outputs:
    """The function's outputs, sorted by what becomes of them; each list has their numbers.

    `stacked` are written into whole results; `last` do not depend on the mapped axis, so any chunk's will do; `known`
    finds those that were known before the loop; the others are reduced, those of `reduced_known` although they were
    known before the loop.
    """

    element: Element
    reductions: tuple[Reduction, ...]

    @property
    def reduced(self) -> set[int]:
        return {i for reduction in self.reductions for i in reduction.indices}

    @property
    def in_loop(self) -> list[int]:
        return [i for i, output in enumerate(self.element.outputs) if not isinstance(output, Shared)]

    @property
    def stacked(self) -> list[int]:
        return [i for i in self.in_loop if i not in self.reduced and self.element.out_axes[i] is not None]

    @property
    def last(self) -> list[int]:
        return [i for i in self.in_loop if i not in self.reduced and self.element.out_axes[i] is None]

    @property
    def reduced_known(self) -> list[int]:
        return [i for i in sorted(self.reduced) if isinstance(self.element.outputs[i], Shared)]

    def known(self, values: Values) -> dict[int, Any]:
        """The outputs that were known before the loop, by number."""
        return {i: values[o.index] for i, o in enumerate(self.element.outputs) if isinstance(o, Shared)}

    def axis(self, i: int) -> int:
        """The axis along which a stacked output is stacked, counted from the front."""
        return self.element.out_axes[i] % len(self.element.results[i].shape)

    def chunk_axis(self, i: int) -> int | None:
        """The same for a chunk of any output; reduced ones are stacked in front."""
        if i in self.reduced:
            return 0
        return None if self.element.out_axes[i] is None else self.axis(i)

    def leading(self, reduction: Reduction) -> list[Any]:
        """The types of a reduction's outputs, when stacked along axis 0."""
        return [
            jax.eval_shape(partial(self._to_front, i), plain_type(self.element.results[i])) for i in reduction.indices
        ]

    def _to_front(self, i: int, y: Any) -> Any:
        if self.element.out_axes[i] is None:
            return jnp.broadcast_to(y, (1, *y.shape))
        return jnp.moveaxis(y, self.axis(i), 0)


@dataclass(frozen=True)
class Program:
    """One element's program, with everything that is needed to run it over the axis.

    `axis_name` is there only where one chunk is the whole axis, `chunked` only elsewhere.
    """

    element: Element
    in_axes: tuple[int, ...]
    reductions: tuple[Reduction, ...]
    layout: Layout
    plan: ChunkPlan
    checkpoint: bool
    on_chunk: Callable[[Any], None] | None = None
    axis_name: Any = None
    chunked: ChunkedAxis | None = None

    @property
    def outputs(self) -> Outputs:
        return Outputs(self.element, self.reductions)

    def run(self, closed: Values, mapped: Values) -> Any:
        """The function's output for the whole axis; `closed` are the values that the function closes over."""
        consts, known_values = self.element.share(closed)
        known = self.outputs.known(known_values)
        wholes = [self.layout.divide(x, axis) for x, axis in zip(mapped, self.in_axes, strict=True)]
        consts = [*consts, *(known[i] for i in self.outputs.reduced_known)]
        state, results = self._over_chunks(consts, self._start(), wholes)
        values = self._finish(state, results) | {
            i: self._spread(i, y) for i, y in known.items() if i not in self.outputs.reduced
        }
        return jax.tree.unflatten(self.element.treedef, [values[i] for i in range(len(values))])

    def _finish(self, state: Values, results: Values) -> dict[int, Any]:
        """The outputs that the loop computed, by number."""
        num_last = len(self.outputs.last)
        values = dict(zip(self.outputs.last, state[:num_last], strict=True))
        for i, y in zip(self.outputs.stacked, results, strict=True):
            values[i] = self.layout.unite(y, self.outputs.axis(i))
        for reduction, final in zip(self.reductions, self._states(state[num_last:]), strict=True):
            joined = reduction.join_blocks(final) if self.layout.over else final
            results = reduction.finish(joined, self.outputs.leading(reduction), self.layout.size)
            values |= dict(zip(reduction.indices, results, strict=True))
        return values

    def _over_chunks(self, consts: Values, state: Values, wholes: Values) -> tuple[Values, Values]:
        """The last state and the whole results."""
        if not self.layout.size:
            return self._over_nothing(consts, state, wholes)
        num_consts, num_state = len(consts), len(state)
        frame = Frame(
            segments=self.plan.segments,
            inputs=(*[None] * (num_consts + num_state), *(Slot(self.layout.loop_axis(a)) for a in self.in_axes)),
            outputs=(
                *[None] * num_state,
                *(Slot(self.layout.loop_axis(self.outputs.axis(i))) for i in self.outputs.stacked),
            ),
            carried=tuple((num_consts + k, k) for k in range(num_state)),
            in_blocks=self.layout.blocks > 1,
            checkpoint=self.checkpoint,
            on_chunk=self.on_chunk,
            chunked=self.chunked,
        )

        def step(segment: int, values: list[Any]) -> list[Any]:
            return self._step(
                self.plan.segments[segment].size,
                values[:num_consts],
                values[num_consts : num_consts + num_state],
                values[num_consts + num_state :],
            )

        found = loop(step, frame, [*consts, *state, *wholes])
        return found[:num_state], found[num_state:]

    def _over_nothing(self, consts: Values, state: Values, wholes: Values) -> tuple[Values, Values]:
        """The same where there is no element. What does not depend on the mapped axis has a value even so."""
        parts = [self.layout.unite(x, axis) for x, axis in zip(wholes, self.in_axes, strict=True)]
        values = dict(zip(self.outputs.in_loop, self._map(0, consts[: self.element.num_consts], parts), strict=True))
        last = self.outputs.last
        return (
            [*(values[i] for i in last), *state[len(last) :]],
            [self.layout.divide(values[i], self.outputs.axis(i)) for i in self.outputs.stacked],
        )

    def _start(self) -> list[Any]:
        last = [filled(plain_type(self.element.results[i])) for i in self.outputs.last]
        states = [x for r in self.reductions for x in r.start(self.outputs.leading(r))]
        if self.layout.over:
            states = [divided_over(x, self.layout.blocks, self.layout.over) for x in states]
        return [*last, *states]

    def _step(self, size: int, consts: Values, state: Values, parts: Values) -> list[Any]:
        size *= self.layout.blocks
        parts = [self.layout.unite(x, axis) for x, axis in zip(parts, self.in_axes, strict=True)]
        num_consts, num_last = self.element.num_consts, len(self.outputs.last)
        values = dict(zip(self.outputs.in_loop, self._map(size, consts[:num_consts], parts), strict=True))
        for i, y in zip(self.outputs.reduced_known, consts[num_consts:], strict=True):
            values[i] = jax.vmap(lambda y=y: y, axis_size=size)()
        stacked = [self.layout.divide(values[i], self.outputs.axis(i)) for i in self.outputs.stacked]
        return [*(values[i] for i in self.outputs.last), *self._reduce(state[num_last:], values), *stacked]

    def _map(self, size: int, consts: Values, parts: Values) -> list[Any]:
        mapped = jax.vmap(
            lambda consts, parts: eval_jaxpr(self.element.jaxpr, (), *consts, *parts),
            in_axes=(None, list(self.in_axes)),
            out_axes=[self.outputs.chunk_axis(i) for i in self.outputs.in_loop],
            axis_size=size,
            axis_name=self.axis_name,
        )
        return mapped(list(consts), list(parts))

    def _reduce(self, state: Values, values: dict[int, Any]) -> list[Any]:
        new: list[Any] = []
        for reduction, old in zip(self.reductions, self._states(state), strict=True):
            chunk = [values[i] for i in reduction.indices]
            if self.layout.over:
                blocks = [spread_along_first(self.layout.divide(y, 0), self.layout.over) for y in chunk]
                new += jax.vmap(reduction.add)(old, blocks)
            else:
                new += reduction.add(old, chunk)
        return new

    def _states(self, state: Values) -> list[Values]:
        ends = accumulate(r.num_state for r in self.reductions)
        return [state[end - r.num_state : end] for r, end in zip(self.reductions, ends, strict=True)]

    def _spread(self, i: int, value: Any) -> Any:
        axis = self.element.out_axes[i]
        return value if axis is None else jax.vmap(lambda: value, out_axes=axis, axis_size=self.layout.size)()
