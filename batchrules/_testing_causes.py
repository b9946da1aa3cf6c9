"""The likely cause of a failure, found by changing one argument of one element and looking at what else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchrules._errors import BatchContractError, ReadOnlyArgumentError
from batchrules._testing_cases import Case, Level, batch_sizes
from batchrules._testing_comparisons import ratio
from batchrules._testing_leaves import Array
from batchrules._testing_run import Attempt, Failure, Subject, Target, Way, attempt

OTHERS = "the result of an element depends on the other elements of the batch"
REFUSED = "the check of batches of the function itself (verify=) refuses what agrees within the tolerance"
OFTEN = " (summed too often)"
BY_CHANCE = "a batch fails unless its size is that of another dimension,"
IMPURE = "the result differs between two equal calls: the function is not pure"
MUTATES = "the function writes into its argument"


@dataclass(frozen=True)
class Cause:
    """What is probably wrong, in words, and the argument that shows it, where another could."""

    text: str
    through: str = ""


@dataclass(frozen=True, eq=False)
class Probe:
    """Experiments with one way to batch a target.

    Attributes:
        target: The function.
        way: The way that failed.
        simple: The simplest way to batch the same target.
        subject: What to run: without its check of batches, if it has one.
    """

    target: Target
    way: Way
    simple: Way
    subject: Subject

    def attempt(self, case: Case, way: Way | None = None) -> Attempt:
        """Run a case."""
        return attempt(self.target, way or self.way, case, self.subject)

    def agrees(self, case: Case, way: Way | None = None) -> bool:
        """Whether a case agrees with one-element calls."""
        return self.attempt(case, way).failure is None


def cause_of(target: Target, ways: tuple[Way, Way], case: Case, failure: Failure) -> Cause:
    """What is probably wrong; `ways` are the way that failed and the simplest one."""
    if isinstance(failure.error, ReadOnlyArgumentError):
        return Cause(MUTATES)
    way, simple = ways
    probe = Probe(target, way, simple, target.subject.unverified or target.subject)
    if failure.error is not None and target.subject.unverified is not None:
        hidden = probe.attempt(case).failure
        if hidden is None and isinstance(failure.error, BatchContractError):
            return Cause(REFUSED)
        failure = failure if hidden is None or hidden.kind != "values" else hidden
    if not case.levels:
        return Cause(f"{way.name} gives something else than the function itself")
    return _of_batch(probe, case, failure)


def _of_batch(probe: Probe, case: Case, failure: Failure) -> Cause:
    if failure.kind == "values" and probe.way.summed is not None:
        sums = _of_sums(probe, case, failure)
        if sums.text.endswith(OFTEN):
            return sums
    simpler = _simpler(probe, case)
    if simpler is not None:
        return cause_of(probe.target, (probe.simple, probe.simple), *simpler)
    if failure.kind == "values":
        return _one_circumstance(probe, case) or _of_values(probe, case, failure)
    return _one_circumstance(probe, case) or _silent(probe, case) or Cause(_of_text(failure))


def _simpler(probe: Probe, case: Case) -> tuple[Case, Failure] | None:
    """A case that is easier to look at and fails too: one vmap, elements that differ, the simplest way."""
    found: list[Case] = []
    if probe.way is not probe.simple or case.equal:
        found += [*(_resized(case, size) for size in (2, 3) if 0 < size < max(case.sizes)), replace(case, equal=False)]
        found.append(_resized(case, 1))
    if len(case.levels) > 1:
        axes = [tuple(None if axis is None else 0 for axis in level.in_axes) for level in case.levels]
        union = tuple(max(column, key=lambda axis: axis is not None) for column in zip(*axes, strict=True))
        found += [Case((Level(3, one),)) for one in dict.fromkeys([*axes, union])]
    for other in found:
        if other == case and probe.way is probe.simple:
            continue
        tried = probe.attempt(other, probe.simple)
        if tried.failure is not None:
            return other, tried.failure
    return None


def _of_text(failure: Failure) -> str:
    return {
        "error": "a batch fails, where each of its elements on its own does not",
        "warning": "the function does not handle batches, and auto calls it one by one",
        "count": "a batch has another number of outputs than one element",
        "shape": "an output of a batch has another shape than the stacked outputs of its elements",
        "dtype": "an output of a batch has another dtype than that of one element",
    }[failure.kind]


def _one_circumstance(probe: Probe, case: Case) -> Cause | None:
    """What alone makes the difference between right and wrong."""
    if probe.way.name != probe.simple.name and probe.agrees(case, probe.simple):
        return Cause(f"{probe.way.name} is wrong, and {probe.simple.name} of the same arguments is right")
    if case.strided and probe.agrees(replace(case, strided=False)):
        return Cause("only arrays that are not contiguous in memory are wrong")
    if case.equal and probe.agrees(replace(case, equal=False)):
        return Cause("only a batch of equal elements is wrong")
    plain = tuple(Level(level.size, tuple(None if a is None else 0 for a in level.in_axes)) for level in case.levels)
    if plain != case.levels and probe.agrees(replace(case, levels=plain)):
        return Cause("only mapped axes in other places than the first are wrong")
    if math.prod(case.sizes) == 0:
        return Cause("only an empty batch is wrong") if probe.agrees(_resized(case, 2)) else None
    if math.prod(case.sizes) == 1 and all(probe.agrees(_resized(case, size)) for size in (2, 3)):
        return Cause("only a batch of one element is wrong")
    return None


def _resized(case: Case, size: int) -> Case:
    return replace(case, levels=tuple(replace(level, size=size) for level in case.levels))


def _silent(probe: Probe, case: Case) -> Cause | None:
    """What is wrong at another size, where a batch does not fail."""
    if len(case.levels) != 1:
        return None
    leaves = probe.target.leaves
    alone = probe.target.alone([0] * len(leaves))
    own = {size for array in [*(leaf.value for leaf in leaves), *alone] for size in array.shape if size > 1}
    for size in batch_sizes(leaves, alone):
        other = _resized(case, size)
        tried = probe.attempt(other)
        if size in own and size != case.sizes[0] and tried.failure is None and case.sizes[0] not in {0, 1, *own}:
            return Cause(f"{BY_CHANCE} {size}: an argument lines up with the wrong axis")
        if size > 1 and tried.failure is not None and tried.failure.kind == "values":
            found = _specific(probe, other)
            if found is not None:
                return found
    return None


def _of_values(probe: Probe, case: Case, failure: Failure) -> Cause:
    if probe.way.summed is not None:
        return _of_sums(probe, case, failure)
    single = case if len(case.levels) == 1 and case.sizes[0] > 1 else None
    if len(case.levels) == 1 and case.sizes[0] == 1:
        single = _resized(case, 3)
    found = _specific(probe, single) if single is not None else None
    if found is not None:
        return found
    times = ratio(failure.got, failure.wanted) if failure.wanted.size > 1 else None
    if times is not None:
        return Cause(f"{_output(probe, failure)} of a batch is {times:.4g} times what one-element calls give")
    if len(case.levels) > 1:
        return Cause("nested vmaps are wrong: the mapped axes do not line up, or elements get into another order")
    return Cause("the elements of a batch come out differently than on their own")


def _output(probe: Probe, failure: Failure) -> str:
    return probe.target.outputs[failure.output]


def _of_sums(probe: Probe, case: Case, failure: Failure) -> Cause:
    leaf = (probe.way.summed or ())[failure.output]
    missing = [level for level in range(len(case.levels)) if level not in case.along(leaf)]
    name = probe.target.leaves[leaf].name
    if not missing:
        times = ratio(failure.got, failure.wanted) if failure.wanted.size > 1 else None
        suffix = "" if times is None else f": it is {times:.4g} times what one-element calls give"
        return Cause(f"{probe.way.name} is wrong in {name}, which is mapped{suffix}")
    times = ratio(failure.got, failure.wanted)
    said = "" if times is None else f": it is {times:.4g} times that sum"
    often = OFTEN if times is not None and times > 1 and abs(times - round(times)) < 0.02 else ""
    return Cause(f"the cotangent of {name}, which is not mapped, is not the sum over the elements{said}{often}")


def _specific(probe: Probe, case: Case) -> Cause | None:
    """What depends on what, in a batch with one axis."""
    base = probe.attempt(case)
    if not base.got or any(g.shape != w.shape for g, w in zip(base.got, base.wanted, strict=False)):
        return None
    moves = [move for leaf in case_leaves(probe, case) for move in _moves(probe, case, base, leaf)]
    return _dependence(moves) or _order(base) or _spread(moves) or _ends(probe, case, base)


def _dependence(moves: Sequence[_Move]) -> Cause | None:
    for move in moves:
        if move.ignored:
            return Cause(f"the batch dimension of {move.name} is ignored: changing it in one element changes nothing")
    for move in moves:
        if move.misaligned:
            return Cause(f"{move.name} lines up with the wrong axis: its batch dimension meets another dimension")
    return None


def _spread(moves: Sequence[_Move]) -> Cause | None:
    return next((Cause(OTHERS, move.name) for move in moves if move.spreads), None)


def case_leaves(probe: Probe, case: Case) -> list[int]:
    """The leaves that a case with one axis maps, those of the lowest rank first."""
    mapped = [leaf for leaf in range(len(probe.target.leaves)) if case.along(leaf)]
    return sorted(mapped, key=lambda leaf: len(probe.target.leaves[leaf].shape))


@dataclass(frozen=True)
class _Move:
    """What changes where one leaf changes in one element."""

    name: str
    place: int
    low: bool
    changed: list[Array]
    should: bool

    @property
    def ignored(self) -> bool:
        """Nothing changes, and something should."""
        return self.should and not any(mask.any() for mask in self.changed)

    @property
    def spreads(self) -> bool:
        """Another element changes."""
        return any(np.delete(mask, self.place, 0).any() for mask in self.changed)

    @property
    def misaligned(self) -> bool:
        """In other elements, what changes is at the element's place along another axis."""
        return self.spreads and self.low and all(self._at_one_place(mask) for mask in self.changed)

    def _at_one_place(self, mask: Array) -> bool:
        others = np.delete(mask, self.place, 0)
        if not others.any():
            return True
        axes = [axis for axis in range(1, mask.ndim) if mask.shape[axis] == mask.shape[0]]
        return any(not np.delete(others, self.place, axis).any() for axis in axes)


def _moves(probe: Probe, case: Case, base: Attempt, leaf: int) -> Iterator[_Move]:
    leaves = probe.target.leaves
    low = len(leaves[leaf].shape) < max(len(other.shape) for other in leaves)
    for place in reversed(range(case.sizes[0])):
        other = probe.attempt(replace(case, replaced=frozenset({(leaf, place)})))
        if len(other.got) != len(base.got):
            continue
        changed = [_differ(probe, now, then) for now, then in zip(other.got, base.got, strict=True)]
        wanted = zip(other.wanted, base.wanted, strict=True)
        should = any(_differ(probe, now, then).any() for now, then in wanted)
        yield _Move(leaves[leaf].name, place, low, changed, should)


def _differ(probe: Probe, now: Any, then: Any) -> Array:
    """Where two arrays differ by more than noise."""
    if now.shape != then.shape:
        return np.ones(then.shape, bool)
    return ~probe.target.tolerance.close(now, then)


def _order(base: Attempt) -> Cause | None:
    for got, wanted in zip(base.got, base.wanted, strict=True):
        rows = {row.tobytes() for row in wanted}
        moved = any(g.tobytes() != w.tobytes() for g, w in zip(got, wanted, strict=True))
        if len(rows) == len(wanted) and moved and {row.tobytes() for row in got} == rows:
            return Cause("the elements come out in another order")
    return None


def _ends(probe: Probe, case: Case, base: Attempt) -> Cause | None:
    """Whether it is the last element, or the first, that is wrong."""
    wrong: set[int] = set()
    for got, wanted in zip(base.got, base.wanted, strict=True):
        close = probe.target.tolerance.close(got, wanted)
        wrong |= {row for row in range(case.sizes[0]) if not close[row].all()}
    if case.sizes[0] > 1 and len(wrong) == 1:
        names = {case.sizes[0] - 1: "the last", 0: "the first"}
        which = names.get(next(iter(wrong)), "one")
        return Cause(f"only {which} element of a batch is wrong")
    return None
