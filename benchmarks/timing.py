"""Times measured in turns, and the rows of the table that come of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

Function = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One measurement beside its target.

    Attributes:
        what: What was measured.
        peer: What it was measured against.
        ours: Our time, in words.
        theirs: The peer's time, in words.
        measured: The ratio, or another figure with `unit`.
        target: The most that it may be.
        unit: The unit of `measured` and `target`; empty for a ratio.
    """

    what: str
    peer: str
    ours: str
    theirs: str
    measured: float
    target: float
    unit: str = ""

    @property
    def missed(self) -> bool:
        """Whether the target was missed."""
        return not self.measured <= self.target


@dataclass(frozen=True)
class Prepared:
    """A function to time, with what must be done before and after it and is not timed."""

    before: Function
    timed: Function
    after: Function


def median_seconds(candidates: Mapping[str, Function | Prepared], *, rounds: int, repeats: int = 1) -> dict[str, float]:
    """The median time of each candidate, measured in turns, so that a busy machine slows all alike.

    Args:
        candidates: The functions by name; arrays that they return are waited for.
        rounds: How many samples of each.
        repeats: How many calls make one sample, for calls too short to time alone.
    """
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for candidate in candidates.values():
        _seconds(candidate, repeats=1)
    gc.collect()
    for turn in range(rounds):
        # Every other round backwards, so that none always runs after the same neighbour.
        order = names if turn % 2 == 0 else names[::-1]
        for name in order:
            samples[name].append(_seconds(candidates[name], repeats))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _seconds(candidate: Function | Prepared, repeats: int) -> float:
    if not isinstance(candidate, Prepared):
        return _timed(candidate, repeats)
    candidate.before()
    try:
        return _timed(candidate.timed, repeats)
    finally:
        candidate.after()


def _timed(function: Function, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(function())
    return (time.perf_counter() - start) / repeats


def ratio_row(what: str, peer: str, ours: float, theirs: float, target: float) -> Row:
    """A row that compares two times in seconds."""
    return Row(what, peer, in_words(ours), in_words(theirs), ours / theirs, target)


def in_words(seconds: float) -> str:
    """A time with a unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.2f} µs"
    return f"{seconds * 1e3:.2f} ms"


def head() -> None:
    """Print the first line of the table."""
    print(f"{'what':<50} {'against':<38} {'ours':>10} {'theirs':>10} {'measured':>9}   {'target':<10}")


def show(rows: Iterable[Row]) -> list[Row]:
    """Print the rows as they come, and return them."""
    shown = []
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        verdict = "MISSED" if row.missed else "ok"
        print(
            f"{row.what:<50} {row.peer:<38} {row.ours:>10} {row.theirs:>10} "
            f"{f'{row.measured:.3f}{unit}':>9}   {f'<= {row.target:g}{unit}':<10} {verdict}",
            flush=True,
        )
        shown.append(row)
    return shown
