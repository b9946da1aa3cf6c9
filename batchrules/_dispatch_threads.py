"""The threads of one batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

Item = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Threads(Executor):
    """Threads that are gone when the batch is.

    `ThreadPoolExecutor` forgets a thread if KeyboardInterrupt comes while it starts one: `shutdown` does not wait for
    that thread, which may be inside foreign code. This one knows its threads before they start.

    Args:
        workers: The most threads.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._items: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        # No semaphore: KeyboardInterrupt can leave one locked, for good.
        self._idle: queue.SimpleQueue[None] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call, and start a thread if none is idle. Only for the thread that made the pool."""
        future: Future[Any] = Future()
        self._items.put((future, fn, args, kwargs))
        # To start a thread takes milliseconds while others compute; short calls are done before it has started.
        if len(self._threads) < self._workers and not self._has_idle():
            self._start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002  # Executor's
        """End the threads when they have done what is queued, or what they are doing now."""
        if cancel_futures:
            self._cancel_queued()
        for _ in self._threads:
            self._items.put(None)
        for thread in self._threads if wait else ():
            if thread.is_alive():
                thread.join()

    def _has_idle(self) -> bool:
        """Whether a thread waits for this call; it is counted on then."""
        try:
            self._idle.get_nowait()
        except queue.Empty:
            return False
        return True

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"batchrules_{len(self._threads)}")
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (item := self._next()) is not None:
            _do(*item)
            # Or the last result lives until the next call comes.
            del item

    def _next(self) -> Item | None:
        try:
            return self._items.get_nowait()
        except queue.Empty:
            self._idle.put(None)
            return self._items.get()

    def _cancel_queued(self) -> None:
        while not self._items.empty():
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item[0].cancel()


def _do(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001  # raised by `result`, as with any executor
        future.set_exception(error)
