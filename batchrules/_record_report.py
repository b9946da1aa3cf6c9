"""What a recording comes to: a table of the calls by function and endpoint, and totals."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from batchrules._events import RecordedCall
from batchrules._values import shortened

_COLUMNS = ("function", "endpoint", "calls", "elements", "p50", "p95", "max", "in", "out", "failed")
_TEXTS = 2  # the first columns, which are aligned to the left
_WIDTH = 100  # the most columns of the table, for which names are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """The calls of one endpoint of a function.

    Attributes:
        name: The name of the function.
        endpoint: The endpoint; see `RecordedCall`.
        calls: How many calls there were.
        elements: How many elements they were given, together.
        p50: The median of their durations, in seconds.
        p95: The duration that 95% of them did not exceed.
        max: The longest.
        bytes_in: The bytes that they were given, together.
        bytes_out: The bytes that they gave, together.
        failures: How many failed.
    """

    name: str
    endpoint: str
    calls: int
    elements: int
    p50: float
    p95: float
    max: float
    bytes_in: int
    bytes_out: int
    failures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a recording comes to. Prints as a table.

    Attributes:
        rows: The calls by function and endpoint.
        calls: How many calls there were.
        checks: How many of them checked a vectorised call.
        retries: How many of them were made because a vectorised call had failed.
        wall: The seconds that the record lasted.
        inside: The seconds in which some foreign call ran.
        concurrency: How many workers were inside foreign code, on average over these seconds.

    Example:
        >>> import numpy as np, batchrules
        >>> sine = batchrules.host_call(np.sin, lambda x: x, name="sine")
        >>> with batchrules.record() as log:
        ...     result = sine(np.float32(1.0))
        >>> summary = log.summary()
        >>> summary.calls, summary.checks, summary.rows[0].name, 0 < summary.share < 1
        (1, 0, 'sine', True)
    """

    rows: tuple[SummaryRow, ...]
    calls: int
    checks: int
    retries: int
    wall: float
    inside: float
    concurrency: float

    @property
    def share(self) -> float:
        """The share of the wall time in which some foreign call ran."""
        return self.inside / self.wall if self.wall > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON.

        Returns:
            A dict with the attributes and `share`; `rows` is a list of dicts.
        """
        known = asdict(self)
        return {**known, "rows": list(known["rows"]), "share": self.share}

    def __str__(self) -> str:
        """A table of at most 100 columns."""
        if not self.rows:
            return f"No foreign calls in {_seconds(self.wall)}."
        lines = [_COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
        widths[0] = min(widths[0], _WIDTH - sum(widths[1:]) - len(widths) + 1)
        return "\n".join([*(_line(line, widths) for line in lines), *self._totals()])

    def _totals(self) -> Iterable[str]:
        yield ""
        yield (
            f"{_seconds(self.wall)} in all, {self.share:.0%} of it inside foreign code, with "
            f"{self.concurrency:.2g} at a time."
        )
        if self.checks or self.retries:
            yield f"{self.checks} calls checked a vectorised one, and {self.retries} came after one that failed."

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        if not self.rows:
            return f"<p>{html.escape(str(self))}</p>"
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        rows = "".join(f"<tr>{_html_cells(_cells(row))}</tr>" for row in self.rows)
        totals = " ".join(filter(None, self._totals()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p>{html.escape(totals)}</p>"


def summarised(calls: Sequence[RecordedCall], wall: float) -> Summary:
    """The summary of these calls."""
    spans = [(call.start, call.start + call.duration) for call in calls]
    inside = _union(spans)
    by_worker: dict[str, list[tuple[float, float]]] = {}
    for call, span in zip(calls, spans, strict=True):
        by_worker.setdefault(call.worker, []).append(span)
    # Not the sum of durations: a host function that calls another one is one worker all the same.
    busy = sum(_union(of_worker) for of_worker in by_worker.values())
    return Summary(
        rows=tuple(_rows(calls)),
        calls=len(calls),
        checks=sum(call.purpose == "check" for call in calls),
        retries=sum(call.purpose == "retry" for call in calls),
        wall=wall,
        inside=inside,
        concurrency=busy / inside if inside > 0 else 0.0,
    )


def _rows(calls: Sequence[RecordedCall]) -> Iterable[SummaryRow]:
    groups: dict[tuple[str, str], list[RecordedCall]] = {}
    for call in calls:
        groups.setdefault((call.name, call.endpoint), []).append(call)
    for (name, endpoint), group in groups.items():
        durations = [call.duration for call in group]
        p50, p95 = np.percentile(durations, [50, 95]).tolist()
        yield SummaryRow(
            name=name,
            endpoint=endpoint,
            calls=len(group),
            elements=sum(call.elements for call in group),
            p50=p50,
            p95=p95,
            max=max(durations),
            bytes_in=sum(call.bytes_in for call in group),
            bytes_out=sum(call.bytes_out for call in group),
            failures=sum(call.failure is not None for call in group),
        )


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what these spans cover."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _cells(row: SummaryRow) -> tuple[str, ...]:
    times = map(_seconds, (row.p50, row.p95, row.max))
    sizes = map(_bytes, (row.bytes_in, row.bytes_out))
    return (row.name, row.endpoint, str(row.calls), str(row.elements), *times, *sizes, str(row.failures))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    texts = [shortened(cell, width).ljust(width) for cell, width in zip(cells[:_TEXTS], widths, strict=False)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[_TEXTS:], widths[_TEXTS:], strict=True)]
    return " ".join(itertools.chain(texts, numbers)).rstrip()


def _html_cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)


def _seconds(seconds: float) -> str:
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _bytes(count: int) -> str:
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while size >= 999.5 and unit != "PB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"


def _three_digits(number: float) -> str:
    """Three digits, or all those before the point."""
    return f"{number:.0f}" if number >= 999.5 else f"{number:#.3g}".rstrip(".")
