"""The loop over chunks: one primitive, and how it is run.

Parts are sliced out of the operands, each along its own axis, and written into arrays of the results' final shape.
Nothing is transposed, nothing is concatenated, and besides operands and results only one chunk is in memory.

It is a primitive so that its derivatives are loops of the same kind, and as lean; `_bmap_forward` and `_bmap_reverse`
make them. JAX's own derivative of such a loop would add up arrays of full size for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.core
import numpy as np
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import Primitive
from jax.interpreters import mlir

from batchrules._bmap_allocate import arrays_for_results
from batchrules._bmap_body import Body, run, trace
from batchrules._bmap_frame import Frame, Slot
from batchrules._bmap_sharding import placed_like

# A body before it is traced: takes a segment's number, and what a chunk of that segment takes.
Step = Callable[[int, list[Any]], Sequence[Any]]


def loop(step: Step, frame: Frame, operands: Sequence[Any]) -> list[Any]:
    """Run a step over all chunks. What it closes over becomes an operand."""
    bodies, operands = _fitting(step, frame, operands)
    closed = {id(x): x for body in bodies for x in body.consts}
    if not closed:
        return bind(bodies, frame, operands)

    def opened(segment: int, values: list[Any]) -> Sequence[Any]:
        given, body = dict(zip(closed, values, strict=False)), bodies[segment]
        return eval_jaxpr(body.jaxpr, [given[id(x)] for x in body.consts], *values[len(closed) :])

    frame = frame.behind([None] * len(closed))
    bodies, operands = _fitting(opened, frame, [*closed.values(), *operands])
    return bind(bodies, frame, operands)


def _fitting(step: Step, frame: Frame, operands: Sequence[Any]) -> tuple[list[Body], list[Any]]:
    """Bodies, and operands such that what is carried lies after a chunk where it lay before."""
    operands = list(operands)
    while True:
        bodies = traced_bodies(step, frame, [jax.typeof(x) for x in operands])
        types = frame.for_outputs(len(bodies) - 1, bodies[-1].out_avals, None)
        places = {i: types[j] for i, j in frame.carried}
        moved = [placed_like([x], [places[i]])[0] if i in places else x for i, x in enumerate(operands)]
        if all(new is old for new, old in zip(moved, operands, strict=True)):
            return bodies, operands
        operands = moved


def bind(bodies: Sequence[Body], frame: Frame, operands: Sequence[Any]) -> list[Any]:
    """Run the bodies, one for each segment, over all chunks."""
    return loop_p.bind(*operands, bodies=tuple(bodies), frame=frame)


def traced_bodies(step: Step, frame: Frame, types: Sequence[Any]) -> list[Body]:
    """A body for each segment, for operands of these types."""
    return [_traced(step, frame, segment, types) for segment in range(len(frame.segments))]


def _traced(step: Step, frame: Frame, segment: int, types: Sequence[Any]) -> Body:
    places = {j: types[i] for i, j in frame.carried}
    wanted = frame.of_outputs(segment, [places.get(j) for j in range(len(frame.outputs))])

    def flat(*values: Any) -> list[Any]:
        results = step(segment, list(values))
        return [x if kind is None else placed_like([x], [kind])[0] for x, kind in zip(results, wanted, strict=True)]

    return trace(flat, frame.body_types(segment, types))


# --- how it is run ---------------------------------------------------------------------------------------------------


def _run(*operands: Any, bodies: tuple[Body, ...], frame: Frame) -> list[Any]:
    over = {j: i for i, j in frame.carried}
    arrays = arrays_for_results(frame, operands, frame.result_types(bodies))
    held = [operands[over[j]] if j in over else x for j, x in enumerate(arrays)]
    numbers = range(len(bodies))
    for number in reversed(numbers) if frame.backward else numbers:
        held = _Chunks(number, bodies[number], frame, operands).run(held)
    return held


class _Chunks:
    """A segment's chunks. What is *held* is what changes from one to the next: for each result what there is of it."""

    def __init__(self, number: int, body: Body, frame: Frame, operands: Sequence[Any]) -> None:
        self._number, self._body, self._frame, self._operands = number, body, frame, operands
        self._chunks = frame.segments[number]
        self._carried, self._in_place = dict(frame.carried), dict(frame.in_place)

    def run(self, held: Sequence[Any]) -> list[Any]:
        """What is held after all chunks."""
        index = self._chunks.index_type.type
        last = index(self._chunks.count - 1)
        if last == 0:
            return self._advance(index(0), held)

        def step(carry: Any) -> Any:
            i, held = carry
            return lax.add(i, index(1)), self._advance(lax.sub(last, i) if self._frame.backward else i, held)

        return lax.while_loop(lambda carry: lax.le(carry[0], last), step, (index(0), list(held)))[1]

    def _advance(self, chunk: Any, held: Sequence[Any]) -> list[Any]:
        frame, index = self._frame, self._chunks.index_type.type
        start = lax.add(lax.mul(chunk, index(self._chunks.size)), index(self._chunks.start))
        place = _Place(chunk, start, self._chunks.size)
        given = [partial(self._given, i, held, place) for i in range(len(frame.inputs))]
        own = run(self._body, [find() for find in frame.of_inputs(self._number, given)])
        new = frame.for_outputs(self._number, own, None)
        if frame.on_chunk:
            frame.on_chunk(start)
        return [
            old if part is None else place.write(old, part, slot)
            for old, part, slot in zip(held, new, frame.outputs, strict=True)
        ]

    def _given(self, i: int, held: Sequence[Any], place: _Place) -> Any:
        """What the body is given of an operand."""
        if i in self._carried:
            return held[self._carried[i]]
        if i not in self._in_place:
            return place.read(self._operands[i], self._frame.inputs[i])
        # Behind the barrier the part is an array of its own. Otherwise what is computed from it, element by element,
        # might be computed where it is written, which takes a copy of the whole array that is written over.
        return lax.optimization_barrier(place.read(held[self._in_place[i]], self._frame.inputs[i]))


class _Place:
    """The place of one chunk in any array."""

    def __init__(self, chunk: Any, start: Any, size: int) -> None:
        self._chunk, self._start, self._size = chunk, start, size

    # An index is never negative. Saying so spares a kernel that would count it from the end.

    def read(self, whole: Any, slot: Slot | None) -> Any:
        """The chunk's part."""
        if slot is None:
            return whole
        if slot.segment is not None:
            return lax.dynamic_index_in_dim(whole, self._chunk, slot.axis, keepdims=False, allow_negative_indices=False)
        return lax.dynamic_slice_in_dim(whole, self._start, self._size, slot.axis, allow_negative_indices=False)

    def write(self, whole: Any, part: Any, slot: Slot | None) -> Any:
        """The array with the chunk's part in it."""
        if slot is None:
            return part
        start = self._start
        if slot.segment is not None:
            start, part = self._chunk, lax.expand_dims(part, (slot.axis,))
        return lax.dynamic_update_slice_in_dim(whole, part, start, slot.axis, allow_negative_indices=False)


# --- the primitive ---------------------------------------------------------------------------------------------------


def _compiled(*operands: Any, **params: Any) -> list[Any]:
    # JAX forgets the compiled program together with the function made here. It would keep one of a primitive for good.
    with jax.disable_jit(False):  # noqa: FBT003  # JAX's only argument here
        return jax.jit(partial(loop_p.bind, **params))(*operands)


def _abstract(*_types: Any, bodies: tuple[Body, ...], frame: Frame) -> tuple[list[Any], set[Any]]:
    return frame.result_types(bodies), effects_of(bodies, frame)


def effects_of(bodies: Sequence[Body], frame: Frame) -> set[Any]:
    """What JAX must know that running the loop does, besides its results."""
    effects = {effect for body in bodies for effect in body.effects}
    return effects | (_effects_of_report(frame.on_chunk) if frame.on_chunk else set())


def _effects_of_report(on_chunk: Callable[[Any], None]) -> set[Any]:
    def report(start: Any) -> tuple[()]:
        on_chunk(start)
        return ()

    return set(trace(report, [jax.core.ShapedArray((), np.dtype(np.int32))]).effects)


loop_p = Primitive("bmap_loop")
loop_p.multiple_results = True
loop_p.def_impl(_compiled)
loop_p.def_effectful_abstract_eval(_abstract)
mlir.register_lowering(loop_p, mlir.lower_fun(_run, multiple_results=True))
