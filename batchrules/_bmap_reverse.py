"""A loop over chunks in reverse mode: it is cut in two while JAX linearises, and the second half is transposed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Var
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from batchrules._bmap_allocate import filled
from batchrules._bmap_body import Body, run
from batchrules._bmap_collectives import no_collectives
from batchrules._bmap_frame import Frame, pairs_in_place
from batchrules._bmap_loop import effects_of, loop, loop_p
from batchrules._bmap_sharding import placed_like
from batchrules._bmap_split import FirstLoop, halves, known_body, known_frame

# --- partial evaluation ----------------------------------------------------------------------------------------------


def _partial_eval(trace: Any, *tracers: Any, bodies: tuple[Body, ...], frame: Frame) -> list[Any]:
    unknown = [not t.is_known() for t in tracers]
    if all(unknown) or not any(unknown):
        return trace.default_process_primitive(loop_p, tracers, {"bodies": bodies, "frame": frame})
    split = halves(bodies, frame, unknown)
    first = FirstLoop(split, [t.pval.get_known() if t.is_known() else None for t in tracers])
    late: list[Any] = []
    if any(split.unknown_results):
        rest = list(compress(tracers, split.unknown))
        bodies, frame, residuals = first.second([t.aval for t in rest])
        params = {"bodies": bodies, "frame": frame}
        late = trace.default_process_primitive(loop_p, [*map(trace.new_const, residuals), *rest], params)
    known, others = iter(first.results), iter(late)
    return [next(others) if is_late else trace.new_const(next(known)) for is_late in split.unknown_results]


def _partial_eval_custom(
    saveable: Any, unknown: Sequence[bool], has_values: Sequence[bool], eqn: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """What `jax.checkpoint` asks: an equation of what is known, one that is run again later, and what that needs."""
    count = len(eqn.outvars)
    if not any(unknown) and saveable(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params) is True:
        return eqn, None, [False] * count, [False] * count, []
    needed = [v for v, is_there in zip(eqn.invars, has_values, strict=True) if isinstance(v, Var) and not is_there]
    if not any(unknown):
        return eqn, eqn, [False] * count, [True] * count, needed
    split = halves(eqn.params["bodies"], eqn.params["frame"], unknown)
    bodies = tuple(known_body(split, k) for k in range(len(split.cuts)))
    frame = known_frame(split)
    known = eqn.replace(
        invars=list(compress(eqn.invars, split.known)),
        outvars=list(compress(eqn.outvars, split.known_results)),
        params={"bodies": bodies, "frame": frame},
        effects=effects_of(bodies, frame),
    )
    return known, eqn, split.unknown_results, [True] * count, needed


# --- transposition ---------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """An operand or a result of the transposed loop.

    `kind` is "known" (an operand of the loop), "cotangent" (of a result), "sum" (of an operand's cotangents) or "part"
    (of an operand's cotangent); `number` counts the loop's operands or results.
    """

    kind: str
    number: int


def _transpose(cotangents: Sequence[Any], *operands: Any, bodies: tuple[Body, ...], frame: Frame) -> list[Any]:
    linear = [ad.is_undefined_primal(x) for x in operands]
    if all(isinstance(ct, ad.Zero) for ct in cotangents):
        return [ad.Zero(x.aval) if is_linear else None for x, is_linear in zip(operands, linear, strict=True)]
    transposed = _Transposed(bodies, frame, operands)
    found = transposed.run(cotangents)
    return [found.get(i) if is_linear else None for i, is_linear in enumerate(linear)]


class _Transposed:
    """A loop, transposed: cotangents of results go in, cotangents of the operands that it is linear in come out."""

    def __init__(self, bodies: Sequence[Body], frame: Frame, operands: Sequence[Any]) -> None:
        self._bodies, self._frame, self._operands = bodies, frame, operands
        self._carried = dict(frame.carried)
        # What is carried is linear even where its first value is known.
        self._linear = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x) or i in self._carried]

    def run(self, cotangents: Sequence[Any]) -> dict[int, Any]:
        """The cotangents of the operands, by number."""
        given = {_Name("known", i): x for i, x in enumerate(self._operands) if i not in self._linear}
        for j, ct in enumerate(cotangents):
            if j in self._carried.values() or not isinstance(ct, ad.Zero):
                given[_Name("cotangent", j)] = ad.instantiate_zeros(ct)
        for i in self._linear:
            if self._frame.inputs[i] is None and i not in self._carried:
                given[_Name("sum", i)] = ad.instantiate_zeros(ad.Zero(self._operands[i].aval))
        frame, results = self._back(given)

        def step(segment: int, values: list[Any]) -> list[Any]:
            own = dict(zip(frame.of_inputs(segment, given), values, strict=True))
            found = self._step(segment, own)
            return [found[name] for name in frame.of_outputs(segment, results)]

        found = loop(step, frame, list(given.values()))
        return {name.number: ct for name, ct in zip(results, found, strict=True)}

    def _back(self, given: dict[_Name, Any]) -> tuple[Frame, list[_Name]]:
        """The frame of the transposed loop, and the names of its results."""
        old, names = self._frame, list(given)
        results = [_Name("part" if old.inputs[i] is not None else "sum", i) for i in self._linear]
        places = {name: k for k, name in enumerate(names)}
        carried = [
            (places[_Name("cotangent", self._carried[i]) if i in self._carried else name], k)
            for k, (name, i) in enumerate(zip(results, self._linear, strict=True))
            if name.kind == "sum"
        ]
        slots = [old.outputs[n.number] if n.kind == "cotangent" else old.inputs[n.number] for n in names]
        cotangents = [
            (k, jax.typeof(given[name]), slots[k]) for k, name in enumerate(names) if name.kind == "cotangent"
        ]
        parts = [
            (k, self._operands[n.number].aval, old.inputs[n.number]) for k, n in enumerate(results) if n.kind == "part"
        ]
        frame = Frame(
            segments=old.segments,
            inputs=tuple(slots),
            outputs=tuple(old.inputs[name.number] for name in results),
            carried=tuple(carried),
            in_place=pairs_in_place(cotangents, parts),
            backward=not old.backward,
            checkpoint=old.checkpoint,
            after=next((k for k, _, slot in cotangents if slot is not None and slot.segment is None), None),
            in_blocks=old.in_blocks,
            chunked=old.chunked,
        )
        return frame, results

    def _step(self, segment: int, given: dict[_Name, Any]) -> dict[_Name, Any]:
        """What a chunk gives: cotangents of what its body takes."""
        frame, body = self._frame, self._bodies[segment]
        numbers = frame.numbers_in(segment)
        linear = [i for i in numbers if i in self._linear]
        types = {i: kind for i, kind in zip(numbers, body.in_avals, strict=True) if i in linear}

        def of_linear(*values: Any) -> list[Any]:
            unknown = dict(zip(linear, values, strict=True))
            return run(body, [unknown[i] if i in unknown else given[_Name("known", i)] for i in numbers])

        results = frame.numbers_out(segment)
        cotangents = [
            given[_Name("cotangent", j)] if _Name("cotangent", j) in given else placed_like([filled(kind)], [kind])[0]
            for j, kind in zip(results, body.out_avals, strict=True)
        ]
        with no_collectives(frame.chunked):
            found = jax.linear_transpose(of_linear, *types.values())(cotangents)
        return dict(self._kept(i, x, given) for i, x in zip(linear, found, strict=True))

    def _kept(self, i: int, cotangent: Any, given: dict[_Name, Any]) -> tuple[_Name, Any]:
        if self._frame.inputs[i] is not None:
            return _Name("part", i), cotangent
        name = _Name("sum", i)
        return name, cotangent if i in self._carried else lax.add(given[name], cotangent)


pe.custom_partial_eval_rules[loop_p] = _partial_eval
pe.partial_eval_jaxpr_custom_rules[loop_p] = _partial_eval_custom
ad.primitive_transposes[loop_p] = _transpose
