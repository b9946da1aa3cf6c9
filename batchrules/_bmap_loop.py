"""The loop over chunks, and its derivative.

A `Step` works on one chunk: `step(size, consts, state, parts) -> (state, results)`. The loop slices the parts out of whole
arrays, each along its own axis, and writes the results into whole arrays of their final shape. Nothing is transposed,
nothing is concatenated, and besides inputs and results only one chunk is in memory.

The derivative of a loop is the loop of the step's derivative, so the rule below says it of every loop, the derivative's own
included. What JAX does with it in reverse mode is its usual partial evaluation and transposition of one scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from batchrules._bmap_primitives import pop, read, settle, write

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
class Part:
    """A mapped input: the axis it is sliced along.

    `once` says that it is a tangent, which nothing but its own chunk uses: it travels through the loop's carry, so that its
    cotangent is written in place.
    """

    axis: int
    once: bool = False


@dataclass(frozen=True)
class Result:
    """A stacked output: the whole array's type, and the axis it is written along."""

    whole: Any
    axis: int


@dataclass(frozen=True)
class Loop:
    """A loop over chunks, apart from the arrays that it works on.

    `depends` has an entry for each state and each result of the step: which of its inputs (consts, state and parts, numbered
    through) it depends on. `anchor` is the number of an output that is a tangent, if there is one.
    """

    step: Step
    plan: ChunkPlan
    num_consts: int
    num_state: int
    parts: tuple[Part, ...]
    results: tuple[Result, ...]
    depends: tuple[frozenset[int], ...]
    checkpoint: bool
    on_chunk: Callable[[], None] | None
    anchor: int | None = None


def run_loop(loop: Loop, consts: Values, state: Values, wholes: Values) -> tuple[Values, Values]:
    """Run the step over all chunks: the last state, and the whole results."""
    run = jax.custom_jvp(partial(_run, loop))
    run.defjvp(partial(_jvp, loop), symbolic_zeros=True)
    outputs = run(*consts, *state, *wholes)
    return outputs[: loop.num_state], outputs[loop.num_state :]


def run_plain_loop(loop: Loop, consts: Values, state: Values, wholes: Values) -> tuple[Values, Values]:
    """The same without a derivative rule, for steps with effects that JAX bars from such rules."""
    outputs = _run(loop, *consts, *state, *wholes)
    return outputs[: loop.num_state], outputs[loop.num_state :]


# --- running ---------------------------------------------------------------------------------------------------------


def _divide(loop: Loop, inputs: Values) -> tuple[Values, Values, Values]:
    first_part = loop.num_consts + loop.num_state
    return inputs[: loop.num_consts], inputs[loop.num_consts : first_part], inputs[first_part:]


def _run(loop: Loop, *inputs: Any) -> tuple[Any, ...]:
    consts, state, wholes = _divide(loop, inputs)
    fixed = [x for x, part in zip(wholes, loop.parts, strict=True) if not part.once]
    spent = [x for x, part in zip(wholes, loop.parts, strict=True) if part.once]
    carry = (list(state), spent, [lax.full_like(r.whole, 0) for r in loop.results])
    advance = partial(_advance, loop, consts, fixed)
    if loop.plan.first:
        carry = advance(loop.plan.first, carry, np.int32(0))
    if loop.plan.count:
        carry, _ = lax.scan(lambda c, start: (advance(loop.plan.size, c, start), None), carry, loop.plan.starts())
    state, spent, results = carry
    return _settled(loop, (*state, *results), spent)


def _advance(loop: Loop, consts: Values, fixed: Values, size: int, carry: Any, start: Any) -> Any:
    state, spent, results = carry
    popped = [pop(x, start, axis=p.axis, size=size) for x, p in zip(spent, _parts(loop, once=True), strict=True)]
    work = partial(_work, loop, size)
    if loop.checkpoint:
        # The slices of the inputs are taken in there: what is kept for a chunk is its number, not a copy of its inputs.
        # Forward and backward pass are two loops, so nothing can be shared between them by mistake.
        work = jax.checkpoint(work, prevent_cse=False)
    state, parts = work(start, consts, state, fixed, [taken for taken, _ in popped])
    results = [write(x, y, start, axis=r.axis) for x, y, r in zip(results, parts, loop.results, strict=True)]
    if loop.on_chunk:
        loop.on_chunk()
    return state, [rest for _, rest in popped], results


def _parts(loop: Loop, *, once: bool) -> list[Part]:
    return [part for part in loop.parts if part.once == once]


def _work(loop: Loop, size: int, start: Any, consts: Values, state: Values, fixed: Values, taken: Values) -> Any:
    slices = iter([read(x, start, axis=p.axis, size=size) for x, p in zip(fixed, _parts(loop, once=False), strict=True)])
    others = iter(taken)
    parts = [next(others) if part.once else next(slices) for part in loop.parts]
    state, results = loop.step(size, consts, state, parts)
    return list(state), list(results)


def _settled(loop: Loop, outputs: tuple[Any, ...], spent: Values) -> tuple[Any, ...]:
    if loop.anchor is None or not spent:
        return outputs
    anchored = settle(outputs[loop.anchor], *spent)
    return (*outputs[: loop.anchor], anchored, *outputs[loop.anchor + 1 :])


# --- the derivative --------------------------------------------------------------------------------------------------


def _jvp(loop: Loop, primals: Values, tangents: Values) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    active = _active_inputs(loop, {i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)}, primals)
    differentiated = _differentiate(loop, active, primals)
    tangents = [
        lax.full_like(p, 0) if isinstance(t, SymbolicZero) and i in active else t
        for i, (p, t) in enumerate(zip(primals, tangents, strict=True))
    ]
    inputs = _paired(_divide(loop, primals), _divide(loop, [t if i in active else None for i, t in enumerate(tangents)]))
    state, results = run_loop(differentiated, *inputs)
    return _unpaired(loop, _active_outputs(loop, active, primals), state, results)


def _active_inputs(loop: Loop, active: set[int], primals: Values) -> set[int]:
    """The inputs with a tangent: those given one, and each state that comes to depend on one."""
    states = range(loop.num_consts, loop.num_consts + loop.num_state)
    while True:
        reached = {
            i
            for i, depends in zip(states, loop.depends[: loop.num_state], strict=True)
            if depends & active and jnp.issubdtype(primals[i].dtype, jnp.inexact)
        }
        if reached <= active:
            return active
        active = active | reached


def _active_outputs(loop: Loop, active: set[int], primals: Values) -> list[bool]:
    states = primals[loop.num_consts : loop.num_consts + loop.num_state]
    dtypes = [*(x.dtype for x in states), *(r.whole.dtype for r in loop.results)]
    inputs = [loop.num_consts + i for i in range(loop.num_state)]
    reached = [bool(depends & active) for depends in loop.depends]
    # A state that starts with a tangent has one to the end, even where the step only replaces it.
    reached[: loop.num_state] = [i in active for i in inputs]
    return [r and bool(jnp.issubdtype(d, jnp.inexact)) for r, d in zip(reached, dtypes, strict=True)]


def _paired(primals: tuple[Values, ...], tangents: tuple[Values, ...]) -> list[list[Any]]:
    return [[*p, *(x for x in t if x is not None)] for p, t in zip(primals, tangents, strict=True)]


def _differentiate(loop: Loop, active: set[int], primals: Values) -> Loop:
    """The loop over the step's derivative: each active input and output is followed, in its group, by its tangent."""
    outputs = _active_outputs(loop, active, primals)
    groups = _divide(loop, [i in active for i in range(len(primals))])
    num_state = loop.num_state + sum(outputs[: loop.num_state])
    new_results = [r for r, on in zip(loop.results, outputs[loop.num_state :], strict=True) if on]
    first_new_result = num_state + len(loop.results)
    return replace(
        loop,
        step=partial(_step_jvp, loop.step, groups, outputs, loop.num_state),
        num_consts=loop.num_consts + sum(groups[0]),
        num_state=num_state,
        parts=(*loop.parts, *(Part(p.axis, once=True) for p, on in zip(loop.parts, groups[2], strict=True) if on)),
        results=(*loop.results, *new_results),
        depends=_depends(loop, active, outputs),
        anchor=loop.num_state if any(outputs[: loop.num_state]) else first_new_result if new_results else None,
    )


def _depends(loop: Loop, active: set[int], outputs: Sequence[bool]) -> tuple[frozenset[int], ...]:
    """Which inputs of the step's derivative its outputs depend on, in that step's numbering."""
    primal, tangent, number = {}, {}, 0
    total = loop.num_consts + loop.num_state + len(loop.parts)
    for group in _divide(loop, range(total)):
        primal |= {old: number + k for k, old in enumerate(group)}
        number += len(group)
        followed = [old for old in group if old in active]
        tangent |= {old: number + k for k, old in enumerate(followed)}
        number += len(followed)
    values = [frozenset(primal[i] for i in d) for d in loop.depends]
    both = [v | {tangent[i] for i in d & active} for v, d in zip(values, loop.depends, strict=True)]
    n = loop.num_state
    followed = [b if on else None for b, on in zip(both, outputs, strict=True)]
    ordered = [*values[:n], *followed[:n], *values[n:], *followed[n:]]
    return tuple(d for d in ordered if d is not None)


def _step_jvp(
    step: Step,
    groups: tuple[Sequence[bool], ...],
    outputs: Sequence[bool],
    num_state: int,
    size: int,
    *inputs: Values,
) -> tuple[Values, Values]:
    primals = [list(group[: len(on)]) for group, on in zip(inputs, groups, strict=True)]
    tangents = [list(group[len(on) :]) for group, on in zip(inputs, groups, strict=True)]
    places = [(g, i) for g, on in enumerate(groups) for i, is_on in enumerate(on) if is_on]

    def of_active(*active: Any) -> list[Any]:
        filled = [list(group) for group in primals]
        for (g, i), value in zip(places, active, strict=True):
            filled[g][i] = value
        state, results = step(size, *filled)
        return [*state, *results]

    given = [primals[g][i] for g, i in places]
    values, moved = jax.jvp(of_active, given, [t for group in tangents for t in group])
    moved = [t if on else None for t, on in zip(moved, outputs, strict=True)]
    state = [*values[:num_state], *(t for t in moved[:num_state] if t is not None)]
    return state, [*values[num_state:], *(t for t in moved[num_state:] if t is not None)]


def _unpaired(loop: Loop, active: Sequence[bool], state: Values, results: Values) -> tuple[Any, Any]:
    n = loop.num_state
    primals = (*state[:n], *results[: len(loop.results)])
    moved = iter((*state[n:], *results[len(loop.results) :]))
    return primals, tuple(
        next(moved) if on else zero_from_primal(p, symbolic_zeros=True) for p, on in zip(primals, active, strict=True)
    )
