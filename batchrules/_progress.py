"""`progress()`: a bar over the elements of all batches that run inside; and the bar of one host call."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from batchrules import _extras
from batchrules._events import RecordedCall, listening


class _Bar:
    """One tqdm bar, drawn from any thread; it appears with the first elements."""

    def __init__(self, description: str | None, file: TextIO | None) -> None:
        self._description = description
        self._file = file
        self._lock = threading.Lock()
        self._tqdm: Any = None
        self._failed = 0
        self._is_closed = False

    def started(self, name: str, elements: int) -> None:
        """So many elements more are to be called."""
        del name
        self.again(elements, 0)

    def again(self, elements: int, failed: int) -> None:
        """So many elements more, of which some failed when they were called together, and may not fail now."""
        with self._lock:
            if self._is_closed:
                return
            self._failed -= failed
            if self._tqdm is None:
                self._tqdm = self._opened(elements)
            else:
                # Not drawn now: a batch may be one short call of many, and tqdm draws ten times a second.
                self._tqdm.total += elements

    def heard(self, call: RecordedCall) -> None:
        """A call is done."""
        with self._lock:
            if self._is_closed or self._tqdm is None or call.purpose == "check":
                return
            if call.failure is not None:
                self._failed += call.elements
            if self._failed:
                self._tqdm.set_postfix(failed=self._failed, refresh=False)
            self._tqdm.update(call.elements)

    def ended(self) -> None:
        """The bar stays: more may come."""

    def close(self) -> None:
        """Draw it a last time, and let go of it."""
        with self._lock:
            self._is_closed = True
            if self._tqdm is not None:
                self._tqdm.close()

    def _opened(self, elements: int) -> Any:
        tqdm = _extras.imported("tqdm.auto", "progress", "progress").tqdm
        return tqdm(total=elements, desc=self._description, unit=" elements", file=self._file, dynamic_ncols=True)


class OwnBar:
    """The bar of one host call: there while batches of it run.

    Args:
        description: What stands before it; None for the name of what runs.
    """

    def __init__(self, description: str | None) -> None:
        self._description = description
        self._lock = threading.Lock()
        self._running = 0
        self._bar: _Bar | None = None

    def started(self, name: str, elements: int) -> None:
        """A batch is about to run."""
        with self._lock:
            self._running += 1
            if self._bar is None and _is_seen(None):
                self._bar = _Bar(self._description or name, None)
            bar = self._bar
        if bar is not None:
            bar.started(name, elements)

    def again(self, elements: int, failed: int) -> None:
        """A part of it is about to run once more."""
        if (bar := self._bar) is not None:
            bar.again(elements, failed)

    def heard(self, call: RecordedCall) -> None:
        """A call is done."""
        if (bar := self._bar) is not None:
            bar.heard(call)

    def ended(self) -> None:
        """A batch has run."""
        with self._lock:
            self._running -= 1
            bar = self._bar if not self._running else None
            if bar is not None:
                self._bar = None
        if bar is not None:
            bar.close()


def own_bar(progress: Any, where: str) -> OwnBar | None:
    """The bar that a user asked for, or None.

    Args:
        progress: What the user gave: a bool, or the description of the bar.
        where: What messages call the function.

    Raises:
        TypeError: Something else.
        ImportError: tqdm is missing.
    """
    if not isinstance(progress, bool | str):
        raise TypeError(f"{where}: progress must be True, False or a description of the bar; got {progress!r}.")
    if progress is False:
        return None
    _check_installed(f"{where}: progress")
    return OwnBar(progress if isinstance(progress, str) else None)


def _check_installed(what: str) -> None:
    """Raise now, and not when the first batch runs, if there is nothing to draw a bar with."""
    _extras.imported("tqdm", "progress", what)


def _is_seen(file: TextIO | None) -> bool:
    """Whether someone watches: a terminal, or a notebook (whose streams are none)."""
    if file is None and _in_notebook():
        return True
    stream = sys.stderr if file is None else file
    return stream is not None and hasattr(stream, "isatty") and stream.isatty()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def progress(description: str | None = None, *, file: TextIO | None = None, force: bool = False) -> Iterator[None]:
    """Show one bar for all elements that foreign code on the host is called for inside the block.

    Its total grows as batches start; it shows the rate, and how many elements failed. In a notebook it is the
    notebook's own. Where nobody watches (a file, a pipe, CI) there is none. Calls that only check a vectorised call do
    not count; elements that are called once more do.

    As JAX runs programs ahead, wait for results inside the block (`jax.block_until_ready`).

    Args:
        description: What stands before the bar.
        file: Where it is drawn; stderr by default.
        force: Draw it even if `file` is no terminal.

    Raises:
        ImportError: tqdm is missing.
        TypeError: A description that is no string.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
        ... def root(x):
        ...     return np.sqrt(x)
        >>> with batchrules.progress("roots"):
        ...     print(jax.vmap(root)(jnp.array([4.0, 9.0], dtype="float32")))
        [2. 3.]
    """
    if description is not None and not isinstance(description, str):
        raise TypeError(f"progress: description must be a string or None; got {description!r}.")
    _check_installed("progress")
    if not (force or _is_seen(file)):
        yield
        return
    bar = _Bar(description, file)
    try:
        with listening(bar):
            yield
    finally:
        bar.close()
