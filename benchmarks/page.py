"""What was measured, kept in `results.json`, and the page and the drawing that are made of it."""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timing import Row

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
DOCS = HERE.parent / "docs"

INTRODUCTION = """\
# Benchmarks

`make bench` wrote this page. Each row is a figure beside its target. A figure without a unit is a ratio of two times,
ours over the other's, so less is better. Both are measured in one process, in turns, and the figure is the ratio of
their medians; `benchmarks/README.md` in the repository says how.

![Every ratio beside its target](benchmarks.svg)

"""


@dataclass(frozen=True)
class Measured:
    """The rows of one benchmark, and where they were measured."""

    title: str
    where: str
    rows: tuple[Row, ...]


def keep(name: str, rows: Iterable[Row]) -> None:
    """Put the rows of one benchmark in place of those that were measured before."""
    kept = _kept()
    title = (importlib.import_module(name).__doc__ or name).splitlines()[0].rstrip(".")
    kept[name] = {"title": title, "where": _where(), "rows": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write() -> None:
    """Write docs/benchmarks.md and docs/benchmarks.svg."""
    everything = [
        Measured(entry["title"], entry["where"], tuple(Row(**row) for row in entry["rows"]))
        for entry in _kept().values()
    ]
    text = INTRODUCTION + "\n".join(_section(measured) for measured in everything if measured.rows)
    (DOCS / "benchmarks.md").write_text(text, encoding="utf-8")
    _draw([row for measured in everything for row in measured.rows if not row.unit])


def _kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def _where() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpy"))
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return f"{today}, {_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _section(measured: Measured) -> str:
    lines = [
        f"## {measured.title}",
        "",
        f"Measured on {measured.where}.",
        "",
        "| what | against | ours | theirs | measured | target |",
        "|---|---|---:|---:|---:|---:|",
        *(_line(row) for row in measured.rows),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    unit = f" {row.unit}" if row.unit else ""
    figure = f"{row.measured:.3g}{unit}" + (" (missed)" if row.missed else "")
    return f"| {row.what} | {row.peer} | {row.ours} | {row.theirs} | {figure} | {row.target:.3g}{unit} |"


def _draw(rows: Sequence[Row]) -> None:
    import matplotlib as mpl  # noqa: PLC0415  # an extra, needed for the page alone

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "batchrules"
    from matplotlib import pyplot as plt  # noqa: PLC0415  # as above

    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row.measured for row in rows], color=["#c0504d" if row.missed else "#4f81bd" for row in rows])
    axes.scatter([row.target for row in rows], places, marker="|", s=180, color="black", zorder=3, label="target")
    axes.set_yticks(places, [f"{row.what}\nagainst {row.peer}" for row in rows], fontsize=6)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("our time / theirs (log)")
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize=7)
    figure.savefig(DOCS / "benchmarks.svg", metadata={"Date": None})
