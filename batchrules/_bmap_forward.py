"""A loop over chunks under `jvp` and `vmap`, and without what nothing uses: in each case another loop over chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from batchrules._bmap_body import Body, depends, prune, run, trace, with_outputs
from batchrules._bmap_frame import Frame, Slot, either, marked, pairs_in_place
from batchrules._bmap_loop import bind, effects_of, loop, loop_p
from batchrules._bmap_sharding import placed_like

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
    doubled: dict[int, _Doubled] = {}

    def find(segment: int, moving: list[bool]) -> list[bool]:
        doubled[segment] = _Doubled(frame, segment, bodies[segment], moving)
        return doubled[segment].moves

    # What moves before a chunk has a tangent after it, be it zero.
    moving, moves = frame.with_carried(operands, find)
    return _Moving(moving, moves, [doubled[segment].body(moves) for segment in range(len(bodies))])


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
    values = list(operands)
    over: dict[int, _OverBatch] = {}

    def put_in_front(batched: Sequence[bool]) -> None:
        for i, is_batched in enumerate(batched):
            if is_batched and values[i] is operands[i]:
                values[i] = batching.bdim_at_front(operands[i], dims[i], axis.size, axis.explicit_mesh_axis)

    def find(segment: int, batched: list[bool]) -> list[bool]:
        put_in_front(batched)
        types = replace(frame, inputs=_deeper(frame.inputs, batched)).body_types(segment, map(jax.typeof, values))
        over[segment] = _OverBatch(axis, bodies[segment], frame.of_inputs(segment, batched), types)
        return frame.for_outputs(segment, over[segment].differ, default=False)

    batched, gives = frame.with_carried([dim is not None for dim in dims], find)
    put_in_front(batched)
    deeper = replace(
        frame,
        inputs=_deeper(frame.inputs, batched),
        outputs=_deeper(frame.outputs, gives),
        in_place=tuple((i, j) for i, j in frame.in_place if batched[i] == gives[j]),
    )

    def step(segment: int, given: list[Any]) -> list[Any]:
        return over[segment].run(given, frame.of_outputs(segment, gives))

    return loop(step, deeper, values), _lead(gives)


class _OverBatch:
    """A body over a batch, which is the first axis of what it takes and gives.

    Attributes:
        differ: For each of its results whether it differs within the batch. The others have no such axis.
    """

    def __init__(self, axis: Any, body: Body, batched: Sequence[bool], types: Sequence[Any]) -> None:
        self._axis, self._body, self._batched = axis, body, batched
        self.differ: list[bool] = []
        self._over = trace(self._map, types)

    def _map(self, *values: Any) -> list[Any]:
        found = [_Found() for _ in self._body.out_avals]
        differs = next(compress(values, self._batched), np.zeros(self._axis.size))

        def one(differs: Any, *values: Any) -> tuple[()]:
            for x, result in zip(run(self._body, values), found, strict=True):
                _found_p.bind(x, differs, result=result)
            return ()

        jax.vmap(
            one,
            in_axes=(0, *_lead(self._batched)),
            axis_size=self._axis.size,
            axis_name=self._axis.name,
            spmd_axis_name=self._axis.spmd_name,
        )(differs, *values)
        self.differ = [result.dim is not None for result in found]
        return [x.value if x.dim is None else self._front(x.value, x.dim) for x in found]

    def _front(self, x: Any, dim: int | None) -> Any:
        return batching.bdim_at_front(x, dim, self._axis.size, self._axis.explicit_mesh_axis)

    def run(self, values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
        """Its results; those that are wanted so are repeated along the batch where they do not differ."""
        results = zip(run(self._over, values), self.differ, wanted, strict=True)
        return [self._front(x, None) if is_wanted and not differs else x for x, differs, is_wanted in results]


@dataclass(eq=False)
class _Found:
    """A result as JAX has it while it maps: with the batch along `dim`, or None where it does not differ."""

    value: Any = None
    dim: int | None = None


def _note(args: Sequence[Any], dims: Sequence[int | None], *, result: _Found) -> tuple[Any, int | None]:
    result.value, result.dim = args[0], dims[0]
    return args[1], dims[1]


# JAX knows what differs within a batch, and tells a primitive that each result goes through, beside something that does
# differ. Only while JAX maps is it ever bound, so no program has it.
_found_p = Primitive("bmap_found")
batching.primitive_batchers[_found_p] = _note


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
    keeps = [frame.of_inputs(k, needed) for k in range(len(bodies))]
    final = [
        small if own == keep else prune(body, frame.of_outputs(k, given), keep=keep)[0]
        for k, (body, (small, own), keep) in enumerate(zip(bodies, owns, keeps, strict=True))
    ]
    return tuple(final), frame.restricted(needed, given), needed, given


ad.primitive_jvps[loop_p] = _jvp
batching.fancy_primitive_batchers[loop_p] = _batch
pe.dce_rules[loop_p] = _drop_unused
