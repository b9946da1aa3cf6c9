"""A loop over chunks under `jvp` and `vmap`, and without what nothing uses: in each case another loop over chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from batchrules._bmap_body import Body, depends, prune, run, trace, with_outputs
from batchrules._bmap_frame import Frame, Slot, either, marked, pairs_in_place
from batchrules._bmap_loop import bind, effects_of, loop, loop_p
from batchrules._bmap_sharding import placed_like
from batchrules._jax_versions import with_lead

# --- jvp -------------------------------------------------------------------------------------------------------------


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, bodies: tuple[Body, ...], frame: Frame
) -> tuple[list[Any], list[Any]]:
    moving = _find_moving(bodies, frame, [not isinstance(t, ad.Zero) for t in tangents])
    operands = [*primals, *(ad.instantiate_zeros(tangents[i]) for i in marked(moving.operands))]
    double = frame.extended(marked(moving.operands), marked(moving.results))
    results = bind(moving.bodies, _written_over(moving.bodies, double, frame, operands), operands)
    values, derived = results[: len(frame.outputs)], iter(results[len(frame.outputs) :])
    return values, [next(derived) if moves else _zero_for(x) for x, moves in zip(values, moving.results, strict=True)]


def _zero_for(value: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _written_over(bodies: Sequence[Body], double: Frame, frame: Frame, operands: Sequence[Any]) -> Frame:
    """A tangent is taken out of an array part by part, and never again: a result's tangent can be written there."""
    first, second = len(frame.inputs), len(frame.outputs)
    ins = [(i, jax.typeof(operands[i]), double.inputs[i]) for i in range(first, len(operands))]
    types = double.result_types(bodies)
    outs = [(j, types[j], double.outputs[j]) for j in range(second, len(types))]
    return replace(double, in_place=(*frame.in_place, *pairs_in_place(ins, outs)))


@dataclass(frozen=True)
class _Moving:
    """Which operands and results have tangents, and bodies that take and give these, too, behind all others."""

    operands: list[bool]
    results: list[bool]
    bodies: list[Body]


def _find_moving(bodies: Sequence[Body], frame: Frame, operands: Sequence[bool]) -> _Moving:
    doubled: list[_Doubled] = []

    def find(moving: list[bool]) -> list[bool]:
        doubled[:] = [_Doubled(frame, segment, body, moving) for segment, body in enumerate(bodies)]
        return either(*(one.moves for one in doubled))

    # What moves before a chunk has a tangent after it, be it zero.
    moving, moves = frame.with_carried(operands, find)
    return _Moving(moving, moves, [one.body(moves) for one in doubled])


class _Doubled:
    """A segment's body, with tangents of everything that can have one.

    Attributes:
        moves: For each result of the loop, whether it has a tangent that is not always zero.
    """

    def __init__(self, frame: Frame, segment: int, body: Body, operands: Sequence[bool]) -> None:
        self._frame, self._segment, self._body = frame, segment, body
        self._moving = frame.of_inputs(segment, operands)
        self._can_move = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in body.out_avals]
        types = [aval.to_tangent_aval() for aval in compress(body.in_avals, self._moving)]
        self._both = trace(self._derive, [*body.in_avals, *types])
        given = [False] * len(body.in_avals) + [True] * len(types)
        depend = iter(depends(self._both, given)[len(body.out_avals) :])
        self.moves = frame.for_outputs(segment, [can and next(depend) for can in self._can_move], default=False)

    def _derive(self, *values: Any) -> list[Any]:
        count = len(self._body.in_avals)

        def of_moving(*moving: Any) -> list[Any]:
            new = iter(moving)
            return run(self._body, [next(new) if m else x for x, m in zip(values[:count], self._moving, strict=True)])

        primals = tuple(compress(values[:count], self._moving))
        results, tangents = jax.jvp(of_moving, primals, tuple(values[count:]))
        types = [jax.typeof(x) for x in compress(results, self._can_move)]
        # JAX 0.7 gives zeros that do not vary where the others do.
        return [*results, *placed_like(list(compress(tangents, self._can_move)), types)]

    def body(self, moves: Sequence[bool]) -> Body:
        """The body that gives the tangents of these results of the loop."""
        own = self._frame.of_outputs(self._segment, moves)
        wanted = [True] * len(own) + list(compress(own, self._can_move))
        return self._both if all(wanted) else with_outputs(self._both, wanted)


# --- vmap ------------------------------------------------------------------------------------------------------------


def _batch(
    axis: Any, operands: Sequence[Any], dims: Sequence[int | None], *, bodies: tuple[Body, ...], frame: Frame
) -> tuple[list[Any], list[int | None]]:
    def find(batched: list[bool]) -> list[bool]:
        owns = [_batched_results(axis, body, frame.of_inputs(k, batched)) for k, body in enumerate(bodies)]
        return either(*(frame.for_outputs(k, own, default=False) for k, own in enumerate(owns)))

    batched, gives = frame.with_carried([dim is not None for dim in dims], find)

    def step(segment: int, values: list[Any]) -> Sequence[Any]:
        ins, outs = frame.of_inputs(segment, batched), frame.of_outputs(segment, gives)
        return _vmap(axis, bodies[segment], ins, outs)(*values)

    fronted = [
        batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis) if is_batched else x
        for x, dim, is_batched in zip(operands, dims, batched, strict=True)
    ]
    deeper = replace(
        frame,
        inputs=_deeper(frame.inputs, batched),
        outputs=_deeper(frame.outputs, gives),
        in_place=tuple((i, j) for i, j in frame.in_place if batched[i] == gives[j]),
    )
    return loop(step, deeper, fronted), _lead(gives)


def _vmap(axis: Any, body: Body, ins: Sequence[bool], outs: Sequence[bool], each: Any = None) -> Callable[..., Any]:
    """A body over a batch; `each`, if there is one, is called with each result."""

    def one(*values: Any) -> list[Any]:
        results = run(body, values)
        return results if each is None else [each(i, x) for i, x in enumerate(results)]

    return jax.vmap(
        one,
        in_axes=tuple(_lead(ins)),
        out_axes=_lead(outs),
        axis_size=axis.size,
        axis_name=axis.name,
        spmd_axis_name=axis.spmd_name,
    )


def _batched_results(axis: Any, body: Body, batched: Sequence[bool]) -> list[bool]:
    """Which results of a body differ within a batch. JAX knows, and tells a primitive that each result goes through."""
    found = [_Mark() for _ in body.out_avals]
    everything = [True] * len(found)
    mapped = _vmap(axis, body, batched, everything, lambda i, x: _probe_p.bind(x, mark=found[i]))
    types = [
        with_lead(aval, axis.size) if is_batched else aval
        for aval, is_batched in zip(body.in_avals, batched, strict=True)
    ]
    trace(mapped, types)
    return [mark.is_batched for mark in found]


@dataclass(eq=False)
class _Mark:
    is_batched: bool = False


def _note_batch(args: Sequence[Any], dims: Sequence[int | None], *, mark: _Mark) -> tuple[Any, int | None]:
    mark.is_batched = dims[0] is not None
    return args[0], dims[0]


_probe_p = Primitive("bmap_probe")
_probe_p.def_impl(lambda x, **_params: x)
_probe_p.def_abstract_eval(lambda aval, **_params: aval)
batching.primitive_batchers[_probe_p] = _note_batch


def _lead(batched: Sequence[bool]) -> list[int | None]:
    return [0 if is_batched else None for is_batched in batched]


def _deeper(slots: Sequence[Slot | None], batched: Sequence[bool]) -> tuple[Slot | None, ...]:
    """The slots, for arrays of which those that are batched have a dimension more in front."""
    return tuple(
        slot._replace(axis=slot.axis + 1) if slot and is_batched else slot
        for slot, is_batched in zip(slots, batched, strict=True)
    )


# --- what nothing uses -----------------------------------------------------------------------------------------------


def _drop_unused(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    # Up to jax 0.10 the equation is the second argument, from 0.12 on the third.
    eqn = rest[-1]
    bodies, frame = eqn.params["bodies"], eqn.params["frame"]
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    bodies, frame, needed, given = pruned(bodies, frame, used)
    new = eqn.replace(
        invars=list(compress(eqn.invars, needed)),
        outvars=list(compress(eqn.outvars, given)),
        params={"bodies": bodies, "frame": frame},
        effects=effects_of(bodies, frame),
    )
    return needed, new


def pruned(
    bodies: Sequence[Body], frame: Frame, used: Sequence[bool]
) -> tuple[tuple[Body, ...], Frame, list[bool], list[bool]]:
    """A loop for the results that are used: bodies, frame, and which operands it has and which results it gives.

    What is carried stays if it is used itself, or if something that is used depends on it.
    """
    given = list(used)
    while True:
        owns = [prune(body, frame.of_outputs(k, given)) for k, body in enumerate(bodies)]
        needed = either(*(frame.for_inputs(k, own, default=False) for k, (_, own) in enumerate(owns)))
        more = [j for i, j in frame.carried if needed[i] and not given[j]]
        if not more:
            break
        for j in more:
            given[j] = True
    for i, j in frame.carried:
        needed[i] = given[j]
    final = [
        prune(body, frame.of_outputs(k, given), keep=frame.of_inputs(k, needed))[0] for k, body in enumerate(bodies)
    ]
    return tuple(final), frame.restricted(needed, given), needed, given


ad.primitive_jvps[loop_p] = _jvp
batching.fancy_primitive_batchers[loop_p] = _batch
pe.dce_rules[loop_p] = _drop_unused
