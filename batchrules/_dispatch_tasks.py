"""What runs in a worker: a task calls the foreign code for a few elements and reports what each of them gave.

Whatever the foreign code raises is part of that report. What the future of a task raises is therefore always a failure
of the executor itself.
"""

from __future__ import annotations

import contextvars
import pickle
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any

# Of a batch whose tasks run in another process, or on another machine.
ELSEWHERE = "another process"

Outcome = tuple[Any, Any]  # the value, and what went wrong: None, the exception, or its `Carried` form


class _Thread(threading.local):
    serves: tuple[Any, ...] = ()


_thread = _Thread()


def serves() -> tuple[Any, ...]:
    """The executors that wait for the work of this thread, the outermost first."""
    return _thread.serves


def must_stay_here(executor: Any) -> bool:
    """Whether work for that executor (an int: any threads) would wait for a worker that this thread occupies."""
    if isinstance(executor, int):
        return bool(_thread.serves)
    return any(served is executor for served in _thread.serves)


class Link:
    """What the tasks of a batch share with the thread that waits for them.

    A pickled link arrives cut: the other process knows that it is one, and nothing else. That is how a task knows
    whether its exceptions must be fit to travel.
    """

    __slots__ = ("_changed", "_context", "_running", "remote", "serves", "stopped")

    def __init__(self, serves: tuple[Any, ...], *, remote: bool = False) -> None:
        self.serves = serves
        self.remote = remote
        self.stopped = False
        self._context = contextvars.copy_context()
        self._running = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let no task of this process go on to its next element."""
        self.stopped = True

    def wait(self) -> None:
        """Wait for the tasks that run in this process."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    def __reduce__(self) -> tuple[Callable[[], Link], tuple[()]]:
        return cut_link, ()

    def context(self) -> contextvars.Context:
        """The caller's context (`numpy.errstate` is part of it), a copy because two threads cannot be in one."""
        return self._context.copy()


def cut_link() -> Link:
    """The link of a task that has come from another process."""
    return Link((ELSEWHERE,), remote=True)


class Task:
    """A group of elements to call the foreign code for, in order."""

    # No dataclass: Dask takes those apart, looking for futures in them.
    __slots__ = ("call", "keep_going", "link", "payloads")

    def __init__(self, call: Callable[[Any], Any], payloads: Sequence[Any], link: Link, *, keep_going: bool) -> None:
        self.call = call
        self.payloads = payloads
        self.link = link
        self.keep_going = keep_going

    def __dask_tokenize__(self) -> str:
        """Every task differs: Dask would take the result of an equal one for it, and hash all its data to find out."""
        return uuid.uuid4().hex


def perform(task: Task) -> tuple[list[Outcome], float]:
    """Run a task.

    Returns:
        What each element gave, in order: fewer than there are where the task stopped early. And the seconds it took.
    """
    before, _thread.serves = _thread.serves, task.link.serves
    try:
        with task.link:
            return task.link.context().run(_perform, task)
    finally:
        _thread.serves = before


def _perform(task: Task) -> tuple[list[Outcome], float]:
    call, link, keep_going = task.call, task.link, task.keep_going
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    for payload in task.payloads:
        if link.stopped:
            break
        outcome = _outcome(call, payload, link)
        outcomes.append(outcome)
        if outcome[1] is not None and not keep_going:
            break
    return outcomes, time.perf_counter() - started


# A function of its own, so that the exception's traceback does not hold the list that the exception ends up in.
def _outcome(call: Callable[[Any], Any], payload: Any, link: Link) -> Outcome:
    try:
        return call(payload), None
    except BaseException as error:  # noqa: BLE001  # carried to the calling thread, which raises it
        return None, Carried(error) if link.remote else error


class RemoteTraceback(Exception):  # noqa: N818  # the cause of an error, which is what a traceback shows it as
    """Where in a worker process an exception was raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'in a worker process:\n"""\n{self.text}"""'


class RemoteError(RuntimeError):
    """Stands for an exception of the foreign code that cannot be sent from one process to another."""


class Carried:
    """An exception on its way to another process: pickled if that can be done, and as text in any case."""

    def __init__(self, error: BaseException) -> None:
        self._text = "".join(traceback.format_exception_only(error)).strip()
        self._traceback = "".join(traceback.format_exception(error))
        self._pickled = _pickled(error)

    def arrived(self) -> BaseException:
        """The exception, or what stands for it; its cause shows where it was raised."""
        error = _unpickled(self._pickled)
        if error is None:
            error = RemoteError(f"{self._text}\n(The exception itself cannot be pickled; this stands for it.)")
        error.__cause__ = RemoteTraceback(self._traceback)
        return error


def _pickled(error: BaseException) -> bytes:
    # Only cloudpickle can send an exception whose class was defined in a notebook. Its executors have it loaded.
    for module in (pickle, sys.modules.get("cloudpickle")):
        try:
            data = module.dumps(error) if module is not None else b""
        except Exception:  # noqa: BLE001, S112  # pickling runs code of the exception's class, which may raise anything
            continue
        if _unpickled(data) is not None:
            return data
    return b""


def _unpickled(data: bytes) -> BaseException | None:
    try:
        error = pickle.loads(data) if data else None  # noqa: S301  # it comes from a worker, as all results do
    except Exception:  # noqa: BLE001  # as above: a constructor with other arguments than `args`, a missing module
        return None
    return error if isinstance(error, BaseException) else None
