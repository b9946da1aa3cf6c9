"""A loop over chunks cut in two: a loop of what is known early, and a loop of the rest, for reverse mode.

What the second needs of the first are *residuals*. Most are there already: whole operands, or results. What does not
depend on the chunk is computed once, before the loop. The others are stacked, for each segment apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import jax
from jax.extend.core import Var

from batchrules._bmap_body import Body, Cut, alone, cut, cut_to_run_again, needed_for, reached_from, run, with_outputs
from batchrules._bmap_frame import Frame, Slot, either
from batchrules._bmap_loop import bind, traced_bodies


@dataclass(frozen=True)
class Halves:
    """A loop whose bodies are cut in two. What is carried is known before a chunk if it is known after each."""

    frame: Frame
    cuts: list[Cut]
    unknown: list[bool]
    unknown_results: list[bool]

    @property
    def known(self) -> list[bool]:
        return [not is_unknown for is_unknown in self.unknown]

    @property
    def known_results(self) -> list[bool]:
        return [not is_unknown for is_unknown in self.unknown_results]

    def known_in(self, segment: int) -> list[int]:
        """The numbers of the operands that are known, of those that a segment's body takes."""
        return list(compress(self.frame.numbers_in(segment), self.frame.of_inputs(segment, self.known)))

    def known_out(self, segment: int) -> list[int]:
        """The numbers of the results that are known, of those that a segment's body gives."""
        return list(compress(self.frame.numbers_out(segment), self.frame.of_outputs(segment, self.known_results)))


def halves(bodies: Sequence[Body], frame: Frame, unknown: Sequence[bool]) -> Halves:
    """Cut a loop by its unknown operands."""
    cut_one = cut_to_run_again if frame.checkpoint else cut
    if frame.checkpoint:
        _check_effects(bodies)
    cuts: dict[int, Cut] = {}
    results = [False] * len(frame.outputs)

    def find(segment: int, operands: list[bool]) -> list[bool]:
        forced = either(results, frame.carried_from(operands))
        cuts[segment] = cut_one(bodies[segment], frame.of_inputs(segment, operands), frame.of_outputs(segment, forced))
        return frame.for_outputs(segment, cuts[segment].unknown_outputs, default=False)

    while True:
        operands, found = frame.with_carried(unknown, find)
        if all(list(c.unknown_outputs) == frame.of_outputs(k, found) for k, c in cuts.items()):
            return Halves(frame, [cuts[k] for k in range(len(bodies))], operands, found)
        # Some are known in one segment only.
        unknown, results = operands, found


def _check_effects(bodies: Sequence[Body]) -> None:
    """NotImplementedError for effects that must not be repeated, which `jax.checkpoint` refuses too."""
    for effect in (effect for body in bodies for effect in body.effects):
        # The classes have no public names. That of `jax.debug`, and that of collectives, may be repeated.
        if "IO" in type(effect).__name__:
            raise NotImplementedError(
                "bmap: with checkpoint=True each chunk is computed again in reverse mode, which would repeat the side "
                "effects of io_callback. Use checkpoint=False, or jax.debug.callback for effects that may be repeated."
            )


# --- residuals -------------------------------------------------------------------------------------------------------


class _Residual(NamedTuple):
    """Where the second loop finds something that it needs of the first.

    `kind` is "operand" or "result" (of the first loop, `number` counts them), "once" or "stacked" (of a segment's body,
    `number` counts its residuals).
    """

    kind: str
    number: int
    segment: int | None = None


# What only lays out an array in another way costs nothing to do again.
_LAYOUTS = ("reshape", "squeeze", "transpose")


class _Need(NamedTuple):
    """What the rest of a body takes: a residual, to which these equations are applied, one after the other."""

    residual: _Residual
    layout: tuple[Any, ...] = ()

    def of(self, value: Any) -> Any:
        """The same of the residual's value."""
        for eqn in self.layout:
            value = eqn.primitive.bind(value, **eqn.params)
        return value


def _needs(cut_up: Halves, segment: int) -> list[_Need]:
    """What the rest of a segment's body takes, in order."""
    frame, jaxpr = cut_up.frame, cut_up.cuts[segment].known.jaxpr
    operands, results = cut_up.known_in(segment), cut_up.known_out(segment)
    carried = dict(frame.carried)
    places: dict[Any, _Residual] = {
        v: _Residual("result", j) for v, j in zip(jaxpr.outvars, results, strict=False) if frame.outputs[j] is not None
    }
    inputs = zip(jaxpr.invars, operands, strict=True)
    places |= {v: _Residual("operand", i) for v, i in inputs if i not in carried}
    varies = [frame.inputs[i] is not None or i in carried for i in operands]
    changing = reached_from(compress(jaxpr.invars, varies), jaxpr.eqns)
    found = []
    for number, v in enumerate(jaxpr.outvars[len(results) :]):
        source, layout = _behind_layouts(v, jaxpr, places)
        if source is not None:
            found.append(_Need(places[source], layout))
            continue
        is_fixed = not isinstance(v, Var) or not (v in changing or any(eqn.effects for eqn in needed_for(jaxpr, [v])))
        residual = _Residual("once" if is_fixed else "stacked", number, segment)
        found.append(_Need(residual))
        if isinstance(v, Var):
            places[v] = residual
    return found


def _behind_layouts(v: Any, jaxpr: Any, places: Mapping[Any, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The variable at hand that this one is but another layout of, and how; None if there is no such variable."""
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    layout: list[Any] = []
    while isinstance(v, Var):
        if v in places:
            return v, tuple(layout)
        eqn = makers.get(v)
        if eqn is None or eqn.primitive.name not in _LAYOUTS or len(eqn.invars) > 1:
            break
        layout.insert(0, eqn)
        (v,) = eqn.invars
    return None, ()


class FirstLoop:
    """The loop of what is known, run.

    Attributes:
        results: The results of the whole loop that are known, in order.
    """

    def __init__(self, cut_up: Halves, operands: Sequence[Any]) -> None:
        """`operands` has None for those that are not known."""
        self._halves, self._operands = cut_up, operands
        segments = range(len(cut_up.cuts))
        self._needs = [_needs(cut_up, k) for k in segments]
        self.results: list[Any] = []
        # In the order in which the second loop takes them.
        self._values: dict[_Residual, Any] = {}
        self._run_loop()
        for k in segments:
            self._run_once(k)
        self._find_operands_and_results()

    def _of_kind(self, kind: str, segment: int) -> list[_Residual]:
        own = (need.residual for need in self._needs[segment])
        return list(dict.fromkeys(r for r in own if r.kind == kind))

    def _run_loop(self) -> None:
        up, frame = self._halves, known_frame(self._halves)
        stacked = [r for k in range(len(up.cuts)) for r in self._of_kind("stacked", k)]
        frame = replace(frame, outputs=(*frame.outputs, *(Slot(0, r.segment) for r in stacked)))
        if not frame.outputs and not frame.on_chunk and not any(c.known.effects for c in up.cuts):
            return
        bodies = [known_body(up, k, [r.number for r in self._of_kind("stacked", k)]) for k in range(len(up.cuts))]
        found = bind(bodies, frame, list(compress(self._operands, up.known)))
        count = len(found) - len(stacked)
        self.results = found[:count]
        self._values |= dict(zip(stacked, found[count:], strict=True))

    def _run_once(self, segment: int) -> None:
        once = self._of_kind("once", segment)
        if not once:
            return
        up = self._halves
        first = len(up.known_out(segment))
        # It reads none of the operands that chunks have parts of.
        body, used = alone(up.cuts[segment].known, [first + r.number for r in once])
        found = run(body, [self._operands[i] for i in compress(up.known_in(segment), used)])
        self._values |= dict(zip(once, found, strict=True))

    def _find_operands_and_results(self) -> None:
        numbers = compress(range(len(self._halves.frame.outputs)), self._halves.known_results)
        results = dict(zip(numbers, self.results, strict=True))
        for residual in (need.residual for needs in self._needs for need in needs):
            if residual.kind == "operand":
                self._values[residual] = self._operands[residual.number]
            if residual.kind == "result":
                self._values[residual] = results[residual.number]

    def _slot(self, residual: _Residual) -> Slot | None:
        if residual.kind == "stacked":
            return Slot(0, residual.segment)
        frame = self._halves.frame
        slots = {"operand": frame.inputs, "result": frame.outputs}.get(residual.kind)
        return slots[residual.number] if slots else None

    def second(self, types: Sequence[Any]) -> tuple[tuple[Body, ...], Frame, list[Any]]:
        """The loop of the rest: bodies, frame, and the residuals, which come before the unknown operands.

        `types` has those of the unknown operands.
        """
        up = self._halves
        residuals = list(self._values)
        old = up.frame.restricted(up.unknown, up.unknown_results)
        frame = old.behind([self._slot(r) for r in residuals])
        frame = replace(frame, on_chunk=None)

        def step(segment: int, values: list[Any]) -> list[Any]:
            names = frame.of_inputs(segment, [*residuals, *([None] * len(types))])
            count = sum(name is not None for name in names)
            own = dict(zip(names[:count], values[:count], strict=True))
            return up.cuts[segment].rest([need.of(own[need.residual]) for need in self._needs[segment]], values[count:])

        held = list(self._values.values())
        return tuple(traced_bodies(step, frame, [*map(jax.typeof, held), *types])), frame, held


def known_frame(cut_up: Halves) -> Frame:
    """The frame of the loop of what is known."""
    return cut_up.frame.restricted(cut_up.known, cut_up.known_results)


def known_body(cut_up: Halves, segment: int, residuals: Sequence[int] = ()) -> Body:
    """A segment's body of what is known, which gives these residuals too."""
    one = cut_up.cuts[segment]
    own = [True] * one.unknown_outputs.count(False)
    return with_outputs(one.known, [*own, *(r in residuals for r in range(one.num_residuals))])
