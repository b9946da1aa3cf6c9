"""A bar over the chunks, for `bmap(progress=True)`."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from typing import Any

import jax


def check_progress(progress: Any) -> None:
    """An error, now rather than at the first chunk, where there is nothing to draw a bar with."""
    if not isinstance(progress, bool | str):
        raise TypeError(f"bmap: progress must be True, False or a description of the bar; got {progress!r}.")
    if progress is not False and importlib.util.find_spec("tqdm") is None:
        raise ImportError("bmap: progress needs the package tqdm; pip install 'batchrules[progress]' installs it.")


class ProgressBar:
    """A bar that each chunk moves on by one, from whatever thread, and that starts anew when it is full."""

    def __init__(self, total: int, description: str | None) -> None:
        self._total = total
        self._description = description
        self._lock = threading.Lock()
        self._bar: Any = None

    def on_chunk(self, start: Any) -> None:
        """Let the program at hand report, when it is run, the chunk that starts there."""
        # The argument keeps the call in the loop: one that depends on nothing is moved out of it.
        jax.debug.callback(self.advance, start)

    def advance(self, _start: Any) -> None:
        """Move on by one chunk."""
        with self._lock:
            if self._bar is None:
                self._bar = self._new_bar()
            self._bar.update()
            if self._bar.n >= self._total:
                self._bar.close()
                self._bar = None

    def _new_bar(self) -> Any:
        tqdm = importlib.import_module("tqdm.auto").tqdm
        return tqdm(total=self._total, desc=self._description, unit="chunk")


def make_bar(progress: bool | str, total: int) -> ProgressBar | None:  # noqa: FBT001
    """The bar that was asked for, or None."""
    if progress is False:
        return None
    return ProgressBar(total, progress if isinstance(progress, str) else None)
