"""Walk a traced program and find its foreign calls: how often each is made, inside what, and which are equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from batchrules._explain_blocks import Alternatives, Block, founds, optional, repeated, total
from batchrules._explain_count import ONE, UNKNOWN, Count, Tally, exactly
from batchrules._explain_foreign import is_foreign
from batchrules._explain_found import Found, Surrounds
from batchrules._explain_source import line_of
from batchrules._explain_values import (
    Names,
    Value,
    behind_barrier,
    consts_of,
    equations_in,
    fits,
    fresh,
    jaxpr_of,
    jaxprs_in,
)

# What a foreign equation calls.
Reader = Callable[[Any, Surrounds], Sequence[Found]]


class Walker:
    """Walks a program.

    Args:
        read: What tells of a foreign equation.

    Attributes:
        merged: How many calls were found to be equal to another.
    """

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._names = Names()
        self._line: str | None = None
        self._consts: dict[Any, Value] = {}
        self.merged = 0

    def run(self, closed: Any, operands: Sequence[Value], block: Block) -> list[Value]:
        """Walk a program with these operands; its outputs."""
        jaxpr = jaxpr_of(closed)
        self.note_constants(closed)
        known = dict(zip(jaxpr.invars, operands, strict=True))
        for variable in jaxpr.constvars:
            known[variable] = self._consts.get(variable) or fresh()
        for eqn in jaxpr.eqns:
            given = [self._value(known, atom) for atom in eqn.invars]
            known |= dict(zip(eqn.outvars, self._equation(eqn, given, block), strict=True))
        return [self._value(known, atom) for atom in jaxpr.outvars]

    def note_constants(self, closed: Any) -> None:
        """Note what the constants of a program are, which will be walked without those that nothing uses."""
        for variable, value in zip(jaxpr_of(closed).constvars, consts_of(closed), strict=False):
            self._consts[variable] = self._literal(value)

    def _literal(self, value: Any) -> Value:
        return Value(self._names.literal(value), 0, 0)

    def _value(self, known: dict[Any, Value], atom: Any) -> Value:
        return self._literal(atom.val) if hasattr(atom, "val") else known[atom]

    def _equation(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        if is_foreign(eqn):
            return self._foreign(eqn, given, block)
        inner = jaxprs_in(tuple(eqn.params.values()))
        return self._programs(eqn, given, block, inner) if inner else self._plain(eqn, given, block)

    def _programs(self, eqn: Any, given: list[Value], block: Block, inner: Sequence[Any]) -> list[Value]:
        """An equation with programs in it. JAX may know the lines of these from there on only."""
        line, self._line = self._line, line_of(eqn) or self._line
        try:
            return self._nested(eqn, given, block, inner)
        finally:
            self._line = line

    def _nested(self, eqn: Any, given: list[Value], block: Block, inner: Sequence[Any]) -> list[Value]:
        structured = _STRUCTURED.get(eqn.primitive.name)
        if structured is not None:
            return structured(self, eqn, given, block)
        if len(inner) == 1 and fits(inner[0], eqn):
            return self.run(inner[0], behind_barrier(eqn, given), block)
        if any(is_foreign(e) for program in inner for e in equations_in(program)):
            return self._unknown(eqn, given, block, inner)
        return self._plain(eqn, given, block)

    def _plain(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        home = block.home(max((value.level for value in given), default=0))
        return self._once(eqn, given, home, lambda: [fresh(given) for _ in eqn.outvars])

    def _foreign(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        home = block.home(max((value.level for value in given), default=0))
        serial = max((value.serial for value in given), default=0)
        notes = () if home is block else ("it is the same in every pass of the loop, so it is called before the loop",)

        def call() -> list[Value]:
            home.entries += [
                replace(found, serial=serial, source=found.source or self._line, notes=(*found.notes, *notes))
                for found in self._read(eqn, block.surrounds)
            ]
            return [fresh(given) for _ in eqn.outvars]

        # XLA keeps calls without arguments apart.
        return self._once(eqn, given, home, call) if home.merges and given else call()

    def _once(self, eqn: Any, given: list[Value], block: Block, do: Callable[[], list[Value]]) -> list[Value]:
        """The outputs of an equation, those of an equal one if there was one in the block."""
        if eqn.effects:
            return do()
        key = self._names.equation(eqn, [value.number for value in given])
        if key not in block.seen:
            block.seen[key] = do()
        elif is_foreign(eqn):
            self.merged += 1
        return block.seen[key]

    # --- loops ---------------------------------------------------------------------------------------------------

    def scan(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """A `scan`: its body as often as it says."""
        return self._loop_once(eqn, given, block, lambda: self._scan(eqn, given, block))

    def _loop_once(self, eqn: Any, given: list[Value], block: Block, do: Callable[[], list[Value]]) -> list[Value]:
        return self._once(eqn, given, block, do) if block.merges else do()

    def _scan(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        jaxpr, length = jaxpr_of(eqn.params["jaxpr"]), eqn.params["length"]
        body, depth = block.inner(loop=True), block.depth + 1
        stacked = [outer.aval.ndim != inner.aval.ndim for outer, inner in zip(eqn.invars, jaxpr.invars, strict=True)]
        carried = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True))
        consts = len(given) - sum(stacked) - carried
        rows: dict[int, Value] = {}
        inside = []
        for i, value in enumerate(given):
            if stacked[i]:
                inside.append(rows.setdefault(value.number, Value(fresh().number, depth, value.serial)))
            elif i < consts or jaxpr.outvars[i - consts] is jaxpr.invars[i]:
                inside.append(value)
            else:
                inside.append(Value(fresh().number, depth, depth))
        if length:
            self.run(eqn.params["jaxpr"], inside, body)
        place = f"a scan of {length}"
        block.entries += [repeated(entry, exactly(length), place, (depth, length)) for entry in body.entries]
        return [fresh(given) for _ in eqn.outvars]

    def bmap(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """The chunks of a `bmap`."""
        return self._loop_once(eqn, given, block, lambda: self._bmap(eqn, given, block))

    def _bmap(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        frame, depth = eqn.params["frame"], block.depth + 1
        for k, (body, segment) in enumerate(zip(eqn.params["bodies"], frame.segments, strict=True)):
            if segment.count == 1:
                self.run(body, [fresh([value]) for value in frame.of_inputs(k, given)], block)
                continue
            inside = block.inner(loop=True)
            self.run(body, frame.of_inputs(k, self._in_chunk(frame, given, depth)), inside)
            place = f"{segment.count} chunks of a bmap"
            block.entries += [repeated(entry, exactly(segment.count), place, (depth, None)) for entry in inside.entries]
        return [fresh(given) for _ in eqn.outvars]

    def _in_chunk(self, frame: Any, given: list[Value], depth: int) -> list[Value]:
        """What the operands of a `bmap` are within a chunk."""
        carried, parts = {i for i, _ in frame.carried}, dict[int, Value]()
        inside = []
        for i, (value, slot) in enumerate(zip(given, frame.inputs, strict=True)):
            if i in carried:
                inside.append(Value(fresh().number, depth, depth))
            elif slot is None:
                inside.append(value)
            else:
                inside.append(parts.setdefault(value.number, Value(fresh().number, depth, value.serial)))
        return inside

    def while_loop(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """A `while_loop`: nobody knows how often."""
        return self._loop_once(eqn, given, block, lambda: self._while(eqn, given, block))

    def _while(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        params, depth = eqn.params, block.depth + 1
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        jaxpr = jaxpr_of(params["body_jaxpr"])
        pairs = zip(given[second:], jaxpr.outvars, jaxpr.invars[params["body_nconsts"] :], strict=True)
        carry = [v if after is before else Value(fresh().number, depth, depth) for v, after, before in pairs]
        test = block.inner(loop=True)
        test.parent = None  # XLA leaves the test where it is.
        body = block.inner(loop=True)
        self.run(params["cond_jaxpr"], [*given[:first], *carry], test)
        self.run(params["body_jaxpr"], [*given[first:second], *carry], body)
        block.entries += [
            repeated(entry, Count(1, None), "the test of a while_loop (unknown times)", (depth, None))
            for entry in test.entries
        ]
        place = "a while_loop (unknown times)"
        block.entries += [repeated(entry, UNKNOWN, place, (depth, None)) for entry in body.entries]
        return [fresh(given) for _ in eqn.outvars]

    # --- branches, devices, and what remains ---------------------------------------------------------------------

    def cond(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """A `cond`: one of its branches."""
        return self._loop_once(eqn, given, block, lambda: self._cond(eqn, given, block))

    def _cond(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        branches = []
        for number, jaxpr in enumerate(eqn.params["branches"]):
            branch = block.inner()
            self.run(jaxpr, given[1:], branch)
            place = f"branch {number} of {len(eqn.params['branches'])} of a cond"
            if len(eqn.params["branches"]) == 2:  # lax.cond, where 0 is False
                place = f"the {bool(number)} branch of a cond"
            branches.append([repeated(entry, ONE, place, (0, None)) for entry in branch.entries])
        if any(branches):
            entries = [optional(entry) for branch in branches for entry in branch]
            block.entries.append(Alternatives(entries, reduce(Tally.either, map(total, branches))))
        return [fresh(given) for _ in eqn.outvars]

    def shard_map(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """A `shard_map`: its body on each device."""
        sizes = dict(eqn.params["mesh"].shape)
        named = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", frozenset(sizes)))
        manual = frozenset(named) - block.surrounds.manual
        surrounds = replace(block.surrounds, manual=block.surrounds.manual | manual)
        devices = math.prod(sizes[name] for name in manual)
        is_whole = all(name in surrounds.manual or size == 1 for name, size in sizes.items())
        inside = block.inner(surrounds=surrounds, merges=is_whole)
        self.run(eqn.params["jaxpr"], [fresh([value]) for value in given], inside)
        block.entries += [
            repeated(entry, exactly(devices), f"a shard_map over {devices} devices", (0, None))
            for entry in inside.entries
        ]
        return [fresh(given) for _ in eqn.outvars]

    def pmap(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """A `pmap` of jax 0.7: its program on each device."""
        devices, inside = eqn.params["axis_size"], block.inner(merges=True)
        self.run(eqn.params["call_jaxpr"], [fresh([value]) for value in given], inside)
        place = f"a pmap over {devices} devices"
        block.entries += [repeated(entry, exactly(devices), place, (0, None)) for entry in inside.entries]
        return [fresh(given) for _ in eqn.outvars]

    def linear_solve(self, eqn: Any, given: list[Value], block: Block) -> list[Value]:
        """A `custom_linear_solve`: only `solve` runs."""
        lengths, jaxpr = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
        first = lengths.matvec + lengths.vecmat
        total = first + lengths.solve + lengths.transpose_solve
        return self.run(jaxpr, [*given[first : first + lengths.solve], *given[total:]], block)

    def _unknown(self, eqn: Any, given: list[Value], block: Block, programs: Sequence[Any]) -> list[Value]:
        for program in programs:
            inside = block.inner()
            self.run(program, [fresh(given) for _ in jaxpr_of(program).invars], inside)
            place = f"{eqn.primitive.name} (unknown times)"
            block.entries += [repeated(entry, UNKNOWN, place, (0, None)) for entry in inside.entries]
        return [fresh(given) for _ in eqn.outvars]


_STRUCTURED: dict[str, Callable[[Walker, Any, list[Value], Block], list[Value]]] = {
    "scan": Walker.scan,
    "bmap_loop": Walker.bmap,
    "while": Walker.while_loop,
    "cond": Walker.cond,
    "shard_map": Walker.shard_map,
    "xla_pmap": Walker.pmap,
    "custom_linear_solve": Walker.linear_solve,
}


def flat_walk(walker: Walker, closed: Any) -> list[Found]:
    """The calls of a program, one after the other; a call in a branch may not be made."""
    block = Block(0, Surrounds(), merges=True)
    walker.run(closed, [fresh() for _ in jaxpr_of(closed).invars], block)
    return founds(block.entries)
