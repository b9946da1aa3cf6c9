"""Try the cases, and gather what disagrees."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from batchrules._errors import ReadOnlyArgumentError
from batchrules._testing_cases import Case, smaller
from batchrules._testing_causes import IMPURE, MUTATES, cause_of
from batchrules._testing_comparisons import difference, shown
from batchrules._testing_leaves import Array
from batchrules._testing_numeric import Finding
from batchrules._testing_report import BatchDisagreement, Disagreement, Report
from batchrules._testing_run import Attempt, Failure, Target, Way, attempt
from batchrules._testing_ways import Plan

_MOST_SMALLER = 12


@dataclass
class _Entry:
    """A disagreement in the making: the smallest case so far."""

    weight: tuple[int, ...]
    program: str
    evidence: str
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    raised: dict[str, str] = field(default_factory=dict)
    through: list[str] = field(default_factory=list)

    def disagreement(self, cause: str) -> Disagreement:
        """What a user is told: with what other cases raised, if they raised something else than this one."""
        others = [f"Other cases raise {text}" for text in self.raised.values() if text not in self.evidence]
        said = f"{cause} (through {', '.join(self.through)})" if self.through else cause
        return Disagreement(said, self.program, "\n".join([self.evidence, *others]), dict(self.counts))


@dataclass
class Checker:
    """Runs plans; keeps the smallest case of each cause."""

    report: Report
    entries: dict[str, _Entry] = field(default_factory=dict)

    def run(self, target: Target, plan: Plan, prefix: str = "") -> None:
        """Try every case of a plan."""
        try:
            target.alone([0] * len(target.leaves))
        except Exception as error:  # noqa: BLE001  # the function itself did not raise it: a finding
            cause = f"{prefix}{target.label} fails for one element"
            self.found(cause, f"{target.label}, one element", f"{type(error).__name__}: {error}", "one element")
            return
        for way, cases in plan:
            self._group(target, (way, plan[0][0]), sorted(cases, key=lambda case: case.weight), prefix)

    def _group(self, target: Target, ways: tuple[Way, Way], cases: Sequence[Case], prefix: str) -> None:
        causes: dict[object, str] = {}
        for case in cases:
            self.report.counts[ways[0].name] += 1
            tried = attempt(target, ways[0], case)
            if tried.failure is None:
                continue
            kind = tried.failure.kind, type(tried.failure.error)
            alike = (*kind, case.pattern, case.equal, case.strided, case.sizes == (1,))
            if alike not in causes:
                of = "" if target.label == target.subject.name else f"{target.label}: "
                cause = cause_of(target, ways, case, tried.failure)
                causes[alike] = prefix + of + cause.text + target.subject.hint
                self._note(target, ways[0], (case, tried), causes[alike])
                self._name(causes[alike], cause.through)
            self.entries[causes[alike]].counts[ways[0].name] += 1

    def _name(self, cause: str, through: str) -> None:
        names = self.entries[cause].through
        if through and through not in names:
            names.append(through)

    def _note(self, target: Target, way: Way, found: tuple[Case, Attempt], cause: str) -> None:
        case, tried = self._shrunk(target, way, found)
        failure = tried.failure or Failure("values")
        entry = _Entry(case.weight, program_of(target, way, case), _evidence(target, failure))
        standing = self.entries.get(cause)
        if standing is None:
            self.entries[cause] = entry
        elif entry.weight < standing.weight:
            standing.weight, standing.program, standing.evidence = entry.weight, entry.program, entry.evidence
        if failure.error is not None:
            self.entries[cause].raised.setdefault(type(failure.error).__name__, failure.text)

    def _shrunk(self, target: Target, way: Way, found: tuple[Case, Attempt]) -> tuple[Case, Attempt]:
        """The first simpler case that fails in the same manner."""
        case, tried = found
        for number, simpler in enumerate(smaller(case)):
            if number >= _MOST_SMALLER:
                break
            again = attempt(target, way, simpler) if simpler.weight < case.weight else tried
            if again.failure is not None and tried.failure is not None and again.failure.kind == tried.failure.kind:
                return (simpler, again) if simpler.weight < case.weight else found
        return found

    def add(self, target: Target, finding: Finding) -> None:
        """Note a derivative of one element that is wrong."""
        pairs = zip(target.leaves, finding.values, strict=False)
        at = ", ".join(f"{leaf.name} = {shown(value)}" for leaf, value in pairs)
        program = f"jax.{finding.mode} of {target.subject.name}, one element: {at}"
        self.found(finding.cause, program, finding.evidence, f"{finding.mode} of one element")

    def found(self, cause: str, program: str, evidence: str, transformation: str) -> None:
        """Note something that no case of a plan shows."""
        entry = self.entries.setdefault(cause, _Entry((), program, evidence))
        entry.counts[transformation] += 1

    def finish(self) -> Report:
        """The report, or the error that lists what is wrong."""
        if not self.entries:
            return self.report
        raise BatchDisagreement([entry.disagreement(cause) for cause, entry in self.entries.items()], self.report)


def program_of(target: Target, way: Way, case: Case) -> str:
    """The program of a case, and what it is given."""
    values = [case.values(i, leaf) for i, leaf in enumerate(target.leaves)]
    described = ", ".join(
        f"{leaf.name} {leaf.value.dtype if leaf.key is None else 'key'}"
        f"{list(value.shape if leaf.key is None else value.shape[:-1])}"
        for leaf, value in zip(target.leaves, values, strict=True)
    )
    axes = " of ".join(
        f"vmap(in_axes={level.in_axes}{f', out_axes={level.out_axis}' if level.out_axis else ''})"
        for level in case.levels
    )
    special = ["equal elements"] * case.equal + ["not contiguous in memory"] * case.strided
    extra = f" ({', '.join(special)})" if special else ""
    return f"{way.name} of {target.subject.name}{f': {axes}' if axes else ''}\ngiven {described}{extra}"


def _evidence(target: Target, failure: Failure) -> str:
    if failure.kind != "values":
        where = f"{target.outputs[failure.output]}: " if failure.kind in {"shape", "dtype"} else ""
        return where + failure.text
    got, wanted = failure.got[failure.index], failure.wanted[failure.index]
    whole = ", ".join(map(str, failure.index))
    element = f"element {whole}, " if failure.index else ""
    return (
        f"{element}{target.outputs[failure.output]}: got {shown(got)}\n"
        f"wanted {shown(wanted)} ({difference(np.asarray(got), np.asarray(wanted))})"
    )


def first_calls(checker: Checker, target: Target) -> bool:
    """Whether two equal calls of one element agree, so that batches can be compared with them."""
    try:
        for number in (0, 1):
            numbers = [number] * len(target.leaves)
            if not _same(target, target.alone(numbers), target.call(numbers)):
                _not_pure(checker, target, "two calls, one after the other")
                return False
    except ReadOnlyArgumentError as error:
        checker.found(MUTATES, f"one call of {target.subject.name}", f"ReadOnlyArgumentError: {error}", "one element")
        return False
    except Exception as error:
        error.add_note(
            f"{checker.report.name}: this came from a call of one element, either of the example or of one made from "
            "it by moving each number a little. Give an example around which the function is defined."
        )
        raise
    return True


def last_call(checker: Checker, target: Target) -> None:
    """Whether the example still gives what it gave at first."""
    numbers = [0] * len(target.leaves)
    if not _same(target, target.alone(numbers), target.call(numbers)):
        _not_pure(checker, target, "the first call and one after all others")


def _not_pure(checker: Checker, target: Target, when: str) -> None:
    checker.found(IMPURE, f"{target.subject.name} called with the same arguments twice", f"compared: {when}", "calls")


def _same(target: Target, one: Sequence[Array], other: Sequence[Array]) -> bool:
    pairs = zip(one, other, strict=True)
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and target.tolerance.close(a, b).all() for a, b in pairs
    )
