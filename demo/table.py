"""The demo's table: one row for each foreign code and method, printed as it is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HEADINGS = ("method", "calls", "(JAX)", "ms", "(JAX)", "ratio", "difference", "allowed")
WIDTHS = (24, 6, 6, 9, 9, 6, 11, 8)


@dataclass(frozen=True)
class Section:
    """What the rows below it have in common: the foreign code, the batch, and how its calls were counted."""

    title: str


@dataclass(frozen=True)
class Row:
    """One method on one foreign code, beside JAX's own rule on the same call.

    Attributes:
        method: What one call is given.
        calls: Foreign calls made for the batch.
        expected_calls: How many the method should make.
        jax_calls: Foreign calls made by JAX's own rule.
        ms: Median time of the batch.
        jax_ms: The same for JAX's own rule, measured in turns.
        difference: The largest difference from the unbatched reference.
        allowed: The most that it may be.
    """

    method: str
    calls: int
    expected_calls: int
    jax_calls: int
    ms: float
    jax_ms: float
    difference: float
    allowed: float

    @property
    def faults(self) -> list[str]:
        """What is wrong with this row, in words; empty when all is well."""
        found = []
        # Written this way round so that a NaN is a fault.
        if not self.difference <= self.allowed:
            found.append(f"the difference {self.difference:.1e} is above {self.allowed:.0e}")
        if self.calls != self.expected_calls:
            found.append(f"{self.calls} calls where {self.expected_calls} were expected")
        return found


def show(lines: Iterable[Section | Row | str]) -> int:
    """Print the table as its lines come, and return how many rows were at fault."""
    faulty = 0
    print(_line(HEADINGS))
    for line in lines:
        if not isinstance(line, Row):
            print(f"\n{line.title if isinstance(line, Section) else line}", flush=True)
            continue
        print(_line(_cells(line)), *(f"  <-- {fault}" for fault in line.faults), flush=True)
        faulty += bool(line.faults)
    return faulty


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"  {row.method}",
        str(row.calls),
        str(row.jax_calls),
        f"{row.ms:.3f}",
        f"{row.jax_ms:.3f}",
        f"{row.ms / row.jax_ms:.2f}",
        f"{row.difference:.1e}",
        f"{row.allowed:.0e}" if row.allowed else "0",
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )
    return " ".join([first, *rest])
