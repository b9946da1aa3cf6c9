"""Recorded calls for other programs: a trace for Perfetto, and a table for pandas."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from batchrules import _extras
from batchrules._events import RecordedCall
from batchrules._record_lanes import lanes

_IN_ARGS = ("method", "purpose", "elements", "first", "last", "bytes_in", "bytes_out", "failure")


def write_perfetto(calls: Sequence[RecordedCall], path: str | os.PathLike[str]) -> None:
    """Write a trace in Chrome's Trace Event Format."""
    trace = {"traceEvents": list(_events(calls)), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(trace), encoding="utf-8")


def _events(calls: Iterable[RecordedCall]) -> Iterator[dict[str, Any]]:
    process = os.getpid()
    yield _named("process_name", "foreign calls", process, 0)
    for track, (worker, of_worker) in enumerate(lanes(calls).items(), start=1):
        yield _named("thread_name", worker, process, track)
        for call in of_worker:
            yield _event(call, process, track)


def _named(what: str, name: str, process: int, track: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _event(call: RecordedCall, process: int, track: int) -> dict[str, Any]:
    known = asdict(call)
    return {
        "ph": "X",
        "name": label(call),
        "cat": call.purpose,
        "ts": 1e6 * call.start,
        "dur": 1e6 * call.duration,
        "pid": process,
        "tid": track,
        "args": {name: known[name] for name in _IN_ARGS},
    }


def label(call: RecordedCall) -> str:
    """What a call is of: the function, and the endpoint if it is a derivative."""
    return call.name if call.endpoint == "call" else f"{call.name} ({call.endpoint})"


def as_frame(calls: Sequence[RecordedCall]) -> Any:
    """A `DataFrame` with one row for each call."""
    pandas = _extras.imported("pandas", "pandas", "Recording.to_pandas")
    columns = [field.name for field in fields(RecordedCall)]
    return pandas.DataFrame([[getattr(call, name) for name in columns] for call in calls], columns=columns)
