"""A bar over the chunks, for `bmap(progress=True)`."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from dataclasses import dataclass, field
from typing import Any

import jax


def check_progress(progress: Any) -> None:
    """An error, now rather than at the first chunk, where there is nothing to draw a bar with."""
    if not isinstance(progress, bool | str):
        raise TypeError(f"bmap: progress must be True, False or a description of the bar; got {progress!r}.")
    if progress is not False and importlib.util.find_spec("tqdm") is None:
        raise ImportError("bmap: progress needs the package tqdm; pip install 'batchrules[progress]' installs it.")


# A run that fails leaves its bar as it stands; of those no more than this many are kept.
MOST_UNFINISHED = 64


@dataclass(eq=False)
class _Run:
    """One run of the mapped function: its bar, and the chunks that it came to."""

    bar: Any
    seen: set[int] = field(default_factory=set)


class ProgressBar:
    """Bars over the chunks of a mapped function: one for each time that it is run, from whatever thread."""

    def __init__(self, total: int, description: str | None) -> None:
        self._total = total
        self._description = description
        self._lock = threading.Lock()
        self._runs: list[_Run] = []

    def on_chunk(self, start: Any) -> None:
        """Let the program at hand report, when it is run, the chunk that starts there."""
        # The argument keeps the call in the loop: one that depends on nothing is moved out of it.
        jax.debug.callback(self.advance, start)

    def advance(self, start: Any) -> None:
        """Move on by the chunk that starts there."""
        with self._lock:
            run = self._run_without(int(start))
            run.seen.add(int(start))
            run.bar.update()
            if len(run.seen) == self._total:
                self._end(run)

    def _run_without(self, start: int) -> _Run:
        """The latest run that has not come to this chunk yet, or a new one: no run comes to a chunk twice."""
        for run in reversed(self._runs):
            if start not in run.seen:
                return run
        if len(self._runs) == MOST_UNFINISHED:
            self._end(self._runs[0])
        self._runs.append(_Run(self._new_bar()))
        return self._runs[-1]

    def _end(self, run: _Run) -> None:
        run.bar.close()
        self._runs.remove(run)

    def _new_bar(self) -> Any:
        tqdm = importlib.import_module("tqdm.auto").tqdm
        return tqdm(total=self._total, desc=self._description, unit="chunk")


def make_bar(progress: bool | str, total: int) -> ProgressBar | None:  # noqa: FBT001
    """The bar that was asked for, or None."""
    if progress is False:
        return None
    return ProgressBar(total, progress if isinstance(progress, str) else None)
