"""A loop over chunks under `jvp`, and without what nothing uses: in each case another loop over chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from batchrules._bmap_body import Body, depends, prune, run, trace, with_outputs
from batchrules._bmap_collectives import no_collectives
from batchrules._bmap_frame import Frame, either, marked, pairs_in_place
from batchrules._bmap_loop import bind, effects_of, loop_p
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
        with no_collectives(self._frame.chunked):
            results, tangents = jax.jvp(of_moving, primals, tuple(values[count:]))
        types = [jax.typeof(x) for x in compress(results, self._can_move)]
        # JAX 0.7 gives zeros that do not vary where the others do.
        return [*results, *placed_like(list(compress(tangents, self._can_move)), types)]

    def body(self, moves: Sequence[bool]) -> Body:
        """The body that gives the tangents of these results of the loop."""
        own = self._frame.of_outputs(self._segment, moves)
        wanted = [True] * len(own) + list(compress(own, self._can_move))
        return self._both if all(wanted) else with_outputs(self._both, wanted)


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
pe.dce_rules[loop_p] = _drop_unused
