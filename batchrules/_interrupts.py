"""Ctrl-C, held back while it would do harm.

An executor's `submit` takes locks in Python code. KeyboardInterrupt can be raised between two lines of it, and then a
lock is never given back: all workers of that executor wait for it, for good.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


class Interrupts:
    """Inside, an interrupt waits for the end of what must be undisturbed. A second one does not wait.

    Python runs the handler of a signal in the main thread only, so in other threads there is nothing to do.
    """

    def __init__(self) -> None:
        self._handler: Handler | None = None
        self._is_held = False
        self._came = False

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        # Unless the foreign code has put a handler of its own there.
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._handler)

    def undisturbed(self, work: Callable[..., T], *args: Any) -> T:
        """Do some work, then let an interrupt through that came meanwhile."""
        self._is_held = True
        try:
            return work(*args)
        finally:
            self._is_held = False
            if self._came:
                self._came = False
                self._pass_on(signal.SIGINT, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_held and not self._came:
            self._came = True
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._handler is not None:
            self._handler(number, frame)
