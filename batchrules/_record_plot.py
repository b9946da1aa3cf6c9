"""Recorded calls as a picture: a lane for each worker, a colour for each endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchrules import _extras
from batchrules._events import RecordedCall
from batchrules._record_export import label
from batchrules._record_lanes import lanes

_HEIGHT = 0.8
_MOST_COLORS = 10  # as many as matplotlib's default cycle has


def plotted(calls: Sequence[RecordedCall], ax: Any) -> Any:
    """Draw the calls over time."""
    pyplot = _extras.imported("matplotlib.pyplot", "plot", "Recording.plot")
    by_worker = lanes(calls)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 1.2 + 0.35 * max(2, len(by_worker))), layout="constrained")
    colors = _colors(calls)
    for position, of_worker in enumerate(by_worker.values()):
        _draw_lane(ax, position, of_worker, colors)
    ax.set_yticks(range(len(by_worker)), list(by_worker))
    ax.invert_yaxis()
    ax.set_xlabel("seconds since the record began")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in colors.items()]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def _colors(calls: Sequence[RecordedCall]) -> dict[str, str]:
    labels = dict.fromkeys(label(call) for call in calls)
    return {name: f"C{number % _MOST_COLORS}" for number, name in enumerate(labels)}


def _draw_lane(ax: Any, position: int, calls: Sequence[RecordedCall], colors: dict[str, str]) -> None:
    ax.broken_barh(
        [(call.start, call.duration) for call in calls],
        (position - _HEIGHT / 2, _HEIGHT),
        facecolors=[colors[label(call)] for call in calls],
        edgecolors=["red" if call.failure is not None else "white" for call in calls],
        linewidths=[1.5 if call.failure is not None else 0.3 for call in calls],
    )
