"""From one element's program to the whole result: which outputs are stacked, kept or reduced, and the loop that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from batchrules._bmap_axes import positive_axis
from batchrules._bmap_loop import ChunkPlan, Loop, Result, Values
from batchrules._bmap_reduce import Reduction
from batchrules._bmap_trace import Element, Shared


@dataclass(frozen=True)
class Layout:
    """How the mapped axis is laid out: `size` elements, in `blocks` equal blocks that every chunk takes a part of."""

    size: int
    blocks: int = 1

    def divide(self, x: Any, axis: int) -> Any:
        """An array with the mapped axis as two, blocks and what is in one."""
        if self.blocks == 1:
            return x
        return lax.reshape(x, (*x.shape[:axis], self.blocks, self.size // self.blocks, *x.shape[axis + 1 :]))

    def unite(self, x: Any, axis: int) -> Any:
        """The inverse of `divide`, for a whole array as for a chunk."""
        if self.blocks == 1:
            return x
        return lax.reshape(x, (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]))

    def redivide(self, x: Any, axis: int) -> Any:
        """A chunk with its axis as two."""
        if self.blocks == 1:
            return x
        return lax.reshape(x, (*x.shape[:axis], self.blocks, x.shape[axis] // self.blocks, *x.shape[axis + 1 :]))

    def loop_axis(self, axis: int) -> int:
        """The axis that the loop slices, when the mapped axis was `axis`."""
        return axis if self.blocks == 1 else axis + 1


@dataclass(frozen=True)
class Program:
    """One element's program with everything that is needed to run it over the axis.

    `axis_name` is there only where one chunk is the whole axis.
    """

    element: Element
    in_axes: tuple[int, ...]
    reductions: tuple[Reduction, ...]
    layout: Layout
    plan: ChunkPlan
    checkpoint: bool
    on_chunk: Callable[[], None] | None = None
    axis_name: Any = None

    def run(self, mapped: Sequence[Any]) -> Any:
        """The function's output for the whole axis."""
        consts, known = self.element.share()
        consts = [*consts, *(known[self.element.outputs[i].index] for i in self._reduced_known)]
        wholes = [self.layout.divide(x, axis) for x, axis in zip(mapped, self.in_axes, strict=True)]
        state, results = self._loop().run(consts, self._start(), wholes)
        return jax.tree.unflatten(self.element.treedef, self._finish(known, list(state), results))

    # The outputs by what becomes of them, each as a list of numbers among the function's outputs.

    @property
    def _reduced(self) -> set[int]:
        return {i for reduction in self.reductions for i in reduction.indices}

    @property
    def _reduced_known(self) -> list[int]:
        return [i for i, o in enumerate(self.element.outputs) if isinstance(o, Shared) and i in self._reduced]

    @property
    def _in_loop(self) -> list[int]:
        return [i for i, o in enumerate(self.element.outputs) if not isinstance(o, Shared)]

    @property
    def _last(self) -> list[int]:
        return [i for i in self._in_loop if self.element.out_axes[i] is None and i not in self._reduced]

    @property
    def _stacked(self) -> list[int]:
        return [i for i in self._in_loop if self.element.out_axes[i] is not None and i not in self._reduced]

    def _axis(self, i: int) -> int:
        return positive_axis(self.element.out_axes[i], len(self.element.results[i].shape))

    # The loop.

    def _loop(self) -> Loop:
        return Loop(
            step=self._step,
            plan=self.plan,
            in_axes=tuple(self.layout.loop_axis(axis) for axis in self.in_axes),
            results=tuple(self._result(i) for i in self._stacked),
            checkpoint=self.checkpoint,
            on_chunk=self.on_chunk,
        )

    def _result(self, i: int) -> Result:
        axis = self._axis(i)
        whole = jax.eval_shape(partial(self.layout.divide, axis=axis), self.element.results[i])
        return Result(whole, self.layout.loop_axis(axis))

    def _start(self) -> list[Any]:
        last = [lax.full_like(self.element.results[i], 0) for i in self._last]
        return [*last, *(x for r in self.reductions for x in r.start(self._leading(r)))]

    def _leading(self, reduction: Reduction) -> list[Any]:
        """The types of its outputs, when stacked along axis 0."""
        return [jax.eval_shape(partial(self._to_front, i), self.element.results[i]) for i in reduction.indices]

    def _to_front(self, i: int, y: Any) -> Any:
        if self.element.out_axes[i] is None:
            return jnp.broadcast_to(y, (self.layout.size, *y.shape))
        return jnp.moveaxis(y, self._axis(i), 0)

    # One chunk.

    def _step(self, size: int, consts: Values, state: Values, parts: Values) -> tuple[Values, Values]:
        size *= self.layout.blocks
        parts = [self.layout.unite(x, axis) for x, axis in zip(parts, self.in_axes, strict=True)]
        given, known = consts[: self.element.num_consts], consts[self.element.num_consts :]
        values = dict(zip(self._in_loop, self._map(size, given, parts), strict=True))
        values |= {
            i: jnp.broadcast_to(y, (size, *y.shape)) for i, y in zip(self._reduced_known, known, strict=True)
        }
        stacked = [self.layout.redivide(values[i], self._axis(i)) for i in self._stacked]
        return [*(values[i] for i in self._last), *self._reduce(state[len(self._last) :], values)], stacked

    def _map(self, size: int, consts: Values, parts: Values) -> list[Any]:
        axes = [self._chunk_axis(i) for i in self._in_loop]
        mapped = jax.vmap(
            lambda consts, parts: jax.core.eval_jaxpr(self.element.jaxpr, (), *consts, *parts),
            in_axes=(None, list(self.in_axes)),
            out_axes=axes,
            axis_size=size,
            axis_name=self.axis_name,
        )
        return mapped(list(consts), list(parts))

    def _chunk_axis(self, i: int) -> int | None:
        if i in self._reduced:
            return 0
        return None if self.element.out_axes[i] is None else self._axis(i)

    def _reduce(self, state: Values, values: dict[int, Any]) -> list[Any]:
        new: list[Any] = []
        for reduction, part in zip(self.reductions, self._states(state), strict=True):
            new += reduction.add(part, [values[i] for i in reduction.indices])
        return new

    def _states(self, state: Values) -> list[Values]:
        """The state of each reduction."""
        ends = list(accumulate(r.num_state for r in self.reductions))
        return [state[end - r.num_state : end] for r, end in zip(self.reductions, ends, strict=True)]

    # The outputs.

    def _finish(self, known: Values, state: list[Any], results: Values) -> list[Any]:
        values = dict(zip(self._last, state, strict=False))
        values |= {
            i: self.layout.unite(y, self._axis(i)) for i, y in zip(self._stacked, results, strict=True)
        }
        for reduction, part in zip(self.reductions, self._states(state[len(self._last) :]), strict=True):
            values |= dict(zip(reduction.indices, reduction.finish(part, self._leading(reduction), self.layout.size), strict=True))
        shared = {i: o for i, o in enumerate(self.element.outputs) if isinstance(o, Shared) and i not in values}
        values |= {i: self._spread_out(i, known[o.index]) for i, o in shared.items()}
        return [values[i] for i in range(len(self.element.outputs))]

    def _spread_out(self, i: int, value: Any) -> Any:
        axis = self.element.out_axes[i]
        if axis is None:
            return value
        return jax.vmap(lambda: value, out_axes=axis, axis_size=self.layout.size)()
