"""A report as text of at most 100 columns, and as HTML for notebooks."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from batchrules._explain_count import Count, Tally, counted
from batchrules._values import shortened

if TYPE_CHECKING:
    from batchrules._explain_report import CallSite

_WIDTH = 100
_NAME = 26
_HEAD = ("#", "foreign code", "method", "calls", "elements each", "bytes in", "bytes out")
_NOTHING = "No foreign calls."
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

Remarks = Sequence[tuple[str, str]]


def as_text(sites: Sequence[CallSite], total: Tally, remarks: Remarks) -> str:
    """The report as text."""
    if not sites:
        return "\n".join([_NOTHING, *_wrapped(remarks)])
    rows = [_HEAD, *(_row(number, site) for number, site in enumerate(sites, 1)), _total_row(total)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    for number, site in enumerate(sites, 1):
        lines += ["", _title(number, site), *_wrapped(_details(site), "    ")]
    return "\n".join([*lines, *([""] if remarks else []), *_wrapped(remarks)])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(w) if i in (1, 2) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _row(number: int, site: CallSite) -> tuple[str, ...]:
    return (
        str(number), shortened(label(site), _NAME), site.method, short(site.calls), _each(site),
        size(site.bytes_in), size(site.bytes_out),
    )  # fmt: skip


def _total_row(total: Tally) -> tuple[str, ...]:
    return "", "total", "", short(total.calls), "", size(total.bytes_in), size(total.bytes_out)


def label(site: CallSite) -> str:
    """What a site is called."""
    return site.name if site.endpoint == "call" else f"{site.name} ({site.endpoint})"


def _each(site: CallSite) -> str:
    if site.first is None or site.last is None:
        return "-"
    return str(site.first) if site.first == site.last else f"{site.first}, last {site.last}"


def short(count: Count) -> str:
    """A count for a narrow column."""
    return _bounded(count, str)


def size(count: Count) -> str:
    """Bytes for a narrow column, to three digits."""
    return _bounded(count, in_units)


def _bounded(count: Count, show: Callable[[int], str]) -> str:
    if count.exact:
        return show(count.low)
    if count.high is None:
        return f"≥ {show(count.low)}"
    return f"≤ {show(count.high)}"


def in_units(number: int) -> str:
    """Bytes in the unit that suits them."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:  # what would round to four digits
        value, unit = value / 1000, unit + 1
    return f"{number} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def _title(number: int, site: CallSite) -> str:
    at = f", {site.source}" if site.source else ""
    return shortened(f"{number}. {site.kind} {label(site)}{at}", _WIDTH)


def _details(site: CallSite) -> Remarks:
    mapped = "; ".join(f"{axis.size} along {', '.join(axis.arguments) or 'no argument'}" for axis in site.axes)
    found = [
        ("mapped", mapped),
        ("method", f"{site.method}, because {site.reason}"),
        ("inside", ", in ".join(reversed(site.places))),
        ("calls", _calls(site) if site.calls.high is not None else ""),
        ("dispatch", site.dispatch),
    ]
    return [*((kind, text) for kind, text in found if text), *(("note", note) for note in site.notes)]


def _calls(site: CallSite) -> str:
    if site.elements is None or (site.calls.exact and site.calls.low == 1 and site.elements == site.calls):
        return "" if site.calls.exact else f"{site.calls}"
    return f"{site.calls}, with {counted(site.elements, 'element')} taken together"


def _wrapped(remarks: Remarks, indent: str = "") -> Iterable[str]:
    for kind, text in remarks:
        yield from textwrap.wrap(
            f"{kind}: {text}", _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
        )


def as_html(sites: Sequence[CallSite], total: Tally, remarks: Remarks) -> str:
    """The report as a table for notebooks."""
    listed = _listed(remarks)
    if not sites:
        return f"<p>{_NOTHING}</p>{listed}"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _HEAD)
    rows = "".join(_html_row(_row(number, site), _details(site)) for number, site in enumerate(sites, 1))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}{_html_row(_total_row(total))}</tbody></table>{listed}"


def _html_row(cells: Sequence[str], details: Remarks = ()) -> str:
    title = html.escape("\n".join(f"{kind}: {text}" for kind, text in details))
    inside = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    more = f'<tr><td></td><td colspan="{len(_HEAD) - 1}">{_listed(details)}</td></tr>' if details else ""
    return f'<tr title="{title}">{inside}</tr>{more}' if details else f"<tr>{inside}</tr>"


def _listed(remarks: Remarks) -> str:
    items = "".join(f"<li><b>{html.escape(kind)}</b>: {html.escape(text)}</li>" for kind, text in remarks)
    return f"<ul>{items}</ul>" if items else ""
