"""The pieces of a program that run as a whole, and what was found in each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from batchrules._explain_count import Count, Tally
from batchrules._explain_found import Found, Surrounds
from batchrules._explain_values import Value


@dataclass(frozen=True, eq=False)
class Alternatives:
    """The branches of a `cond`, one of which runs.

    Attributes:
        entries: What is in them, none of which has to run.
        tally: What runs, whichever branch it is.
    """

    entries: Sequence[Entry]
    tally: Tally


Entry = Found | Alternatives


@dataclass(eq=False)
class Block:
    """A piece of a program that runs as a whole: the program itself, the body of a loop, a branch.

    Attributes:
        depth: How many loops are around it.
        surrounds: The devices around it.
        merges: Whether equal calls in it are one call: on several devices that have to agree, they are not.
        parent: For the body of a loop, the block around it, where calls go that are the same in every pass.
        seen: The outputs of each equation so far, by what equals it.
        entries: What was found.
    """

    depth: int
    surrounds: Surrounds
    merges: bool
    parent: Block | None = None
    seen: dict[Hashable, list[Value]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def home(self, level: int) -> Block:
        """The block that an equation runs in which changes in loops of that depth, and no deeper."""
        block = self
        while block.parent is not None and level < block.depth:
            block = block.parent
        return block

    def inner(self, *, loop: bool = False, surrounds: Surrounds | None = None, merges: bool | None = None) -> Block:
        """A block inside this one."""
        return Block(
            self.depth + loop,
            surrounds or self.surrounds,
            self.merges if merges is None else merges,
            self if loop else None,
        )


def repeated(entry: Entry, count: Count, place: str, loop: tuple[int, int | None]) -> Entry:
    """An entry, so many times; `loop` says how deep the loop is and how many passes a vmap could replace."""
    if isinstance(entry, Alternatives):
        entries = [repeated(e, count, place, loop) for e in entry.entries]
        return Alternatives(entries, entry.tally.times(count))
    return entry.repeated(count, place, *loop)


def optional(entry: Entry) -> Entry:
    """An entry that need not run."""
    if isinstance(entry, Alternatives):
        return Alternatives([optional(e) for e in entry.entries], entry.tally.at_most())
    return replace(entry, tally=entry.tally.at_most())


def founds(entries: Sequence[Entry]) -> list[Found]:
    """All sites, those of all branches too."""
    parts = [[entry] if isinstance(entry, Found) else founds(entry.entries) for entry in entries]
    return [found for part in parts for found in part]


def total(entries: Sequence[Entry]) -> Tally:
    """What all of it amounts to, one branch of each `cond` counted."""
    return reduce(Tally.__add__, (entry.tally for entry in entries), Tally())
