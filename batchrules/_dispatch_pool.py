"""The calling thread's side of a batch on an executor: submit its elements in groups, and settle what comes back."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import pickle
import queue
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from typing import Any

from batchrules._dispatch_tasks import Carried, Link, Outcome, Task, perform, serves
from batchrules._errors import DispatchError
from batchrules._interrupts import Interrupts

DEAD_WORKER = (
    "A worker died: killed, out of memory, a crash in compiled code, or a program that starts processes when it is "
    'imported (put that under `if __name__ == "__main__":`).'
)

# What a failure to pickle says, whatever its type: TypeError and AttributeError are common.
PICKLING = ("pickle", "serializ", "local object")


@dataclass(frozen=True)
class Job:
    """A batch of calls to make, and what to do with their results.

    Args:
        call: What one element (or chunk) costs: payload -> value. Pickled where the executor pickles.
        payloads: One for each element, taken in order and only when there is room for it.
        count: How many there are.
        settle: Called in the calling thread with index and value, in order of completion. May raise: the job stops.
        failed: The same with index and exception.
        keep_going: Whether the elements after a failed one are still called. Otherwise `failed` is expected to raise,
            and if it does not, the exception itself is raised.
        weight: How many bytes the result of one call has.
    """

    call: Callable[[Any], Any]
    payloads: Iterable[Any]
    count: int
    settle: Callable[[int, Any], None]
    failed: Callable[[int, BaseException], None]
    keep_going: bool
    weight: int = 0

    def refuse(self, index: int, error: Any) -> None:
        """Hand over how an element failed: an exception, or its `Carried` form."""
        error = error.arrived() if isinstance(error, Carried) else error
        if not isinstance(error, Exception):
            # KeyboardInterrupt and SystemExit are no result of an element, wherever they were raised.
            raise error
        self.failed(index, error)
        if not self.keep_going:
            raise error


class Pace:
    """How many elements make a task, and how many tasks are submitted ahead.

    Args:
        workers: How many workers there are, or None if nobody knows.
        weight: How many bytes the result of one element has.
        limit: The most tasks that may be submitted and not finished, or None.
    """

    TASK = 2e-3  # seconds: what a task should last at least, and an element that lasts as long is a task of its own
    SUBMITS = 10  # ... and at least as many times the price of submitting it
    WORKERS = 16  # a guess
    LAST = 5e-4  # seconds: what even the last tasks should last
    AHEAD = 4  # tasks for each worker
    RISE = 1.1  # the most by which one report raises what an element is thought to last
    BYTES = 1 << 19  # the most that the results of one task should have

    def __init__(self, workers: int | None, limit: int | None, weight: int = 0) -> None:
        self._limit = math.inf if limit is None else limit
        self._most = max(1, self.BYTES // weight) if weight else math.inf
        if self._most == 1 and workers is not None:
            # Results so large must not pile up: those that run, and one that waits.
            self._limit = min(self._limit, workers + 1)
        self._known = workers is not None
        self._workers = min(workers or self.WORKERS, self._limit)
        self._window = self.AHEAD * (workers or self.WORKERS)
        self._patience = self.TASK
        self._element: float | None = None
        self._first_share = 0.0
        self._submit = math.inf

    def submitted(self, seconds: float) -> None:
        """A task was submitted; the first ones may have started workers, so the cheapest is the price."""
        self._submit = min(self._submit, seconds)

    def finished(self, elements: int, seconds: float) -> None:
        """A task reports how long it took."""
        each = seconds / elements
        # Threads wait for each other (the GIL), which is no reason for smaller groups: down at once, up by and by.
        self._element = each if self._element is None else min(each, self.RISE * self._element)

    def size(self, remaining: int) -> int:
        """How many elements the next task should have."""
        if self._element is None or self._element >= self.TASK:
            return 1
        each, share = max(self._element, 1e-9), remaining / (self.AHEAD * self._workers)
        wanted = max(self.TASK, self.SUBMITS * self._submit) / each
        self._first_share = self._first_share or share
        # Smaller and smaller, so that all workers finish together, but no smaller than is worth a task.
        share = max(share, min(self.LAST / each, self._first_share))
        return max(1, round(min(wanted, share, self._most)))

    def room(self) -> float:
        """How many tasks may be submitted and not finished."""
        # One thread cannot keep more workers busy with short tasks than the window holds; with long ones it can.
        long = not self._known and self._element is not None and self._element >= self.TASK
        return self._limit if long else min(self._limit, self._window)

    def patience(self) -> float | None:
        """How many seconds to wait for a result when there is no room; None: until one comes."""
        return self._patience if self._blind() else None

    def waited(self) -> None:
        """No result came: the elements are long, or the workers far away or not started. So submit more ahead."""
        # Not at once everything: that would be one by one, and the elements may be short after all.
        self._window *= 2
        self._patience *= 4

    def _blind(self) -> bool:
        return not self._known and self._element is None and self._window < self._limit


class PoolRun:
    """One job on one executor, of which only `submit` is used."""

    def __init__(self, job: Job, executor: Executor, workers: int | None, limit: int | None) -> None:
        self._job = job
        self._executor = executor
        self._pace = Pace(workers, limit, job.weight)
        self._link = Link((*serves(), executor))
        self._flying: dict[Future[Any], range] = {}
        self._finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._interrupts = Interrupts()
        self._taken = 0

    @property
    def quiet(self) -> bool:
        """Whether nothing of the job runs any more."""
        return not self._flying

    def run(self) -> None:
        """Run the job to its end, or to its first failure and the end of what runs then."""
        with self._interrupts:
            try:
                self._submit_all()
                while self._flying:
                    self._settle(self._finished.get())
            except BaseException:
                self._abandon()
                raise

    def _submit_all(self) -> None:
        payloads, start = iter(self._job.payloads), 0
        while group := list(itertools.islice(payloads, self._pace.size(self._job.count - start))):
            self._submit(range(start, start + len(group)), group)
            start += len(group)
            while (future := self._next_finished()) is not None:
                self._settle(future)

    def _submit(self, indices: range, payloads: list[Any]) -> None:
        task = Task(self._job.call, payloads, self._link, keep_going=self._job.keep_going)
        started = time.perf_counter()
        try:
            self._interrupts.undisturbed(self._hand_over, task, indices)
        except Exception as error:
            raise self._failure(error) from error
        self._pace.submitted(time.perf_counter() - started)

    def _hand_over(self, task: Task, indices: range) -> None:
        future = self._executor.submit(perform, task)
        self._flying[future] = indices
        future.add_done_callback(self._finished.put)

    def _next_finished(self) -> Future[Any] | None:
        """A finished task, waited for only if there is no room for another."""
        full = len(self._flying) >= self._pace.room()
        try:
            return self._finished.get(block=full, timeout=self._pace.patience() if full else None)
        except queue.Empty:
            if full:
                self._pace.waited()
            return None

    def _settle(self, future: Future[Any]) -> None:
        indices = self._flying.pop(future)
        outcomes, seconds = self._report(future)
        self._pace.finished(len(outcomes), seconds)
        settle = self._job.settle
        # A task that stopped early reports fewer outcomes, and the last of them raises here.
        for index, (value, error) in zip(indices, outcomes, strict=False):
            if error is None:
                settle(index, value)
            else:
                self._job.refuse(index, error)
            self._taken += 1

    def _report(self, future: Future[Any]) -> tuple[list[Outcome], float]:
        try:
            return future.result()
        except (Exception, *_cancellations()) as error:
            raise self._failure(error) from error

    def _abandon(self) -> None:
        """Start nothing more, wait for what runs, and drop its results."""
        self._link.stop()
        # The newest first, or the workers would start the next while we cancel the one before.
        running = [future for future in reversed(self._flying) if not _cancelled(future)]
        # Not through the queue: KeyboardInterrupt can fall between its `get` and the use of what it gave.
        concurrent.futures.wait(running)
        # A second KeyboardInterrupt inside `submit` leaves a task that may run, and no future of it.
        self._link.wait()
        self._flying.clear()

    def _failure(self, error: BaseException) -> DispatchError:
        return DispatchError(
            f"The executor ({type(self._executor).__name__}) failed when {self._taken} of {self._job.count} elements "
            f"were done: {type(error).__name__}: {str(error).rstrip('.')}. {_advice(error)}"
        )


def _cancellations() -> tuple[type[BaseException], ...]:
    """What says that a call was cancelled. Only who has loaded asyncio, which takes a while, can raise its own."""
    loaded = sys.modules.get("asyncio")
    return (concurrent.futures.CancelledError, *(() if loaded is None else (loaded.CancelledError,)))


def _cancelled(future: Future[Any]) -> bool:
    try:
        return future.cancel()
    except NotImplementedError:
        # Parsl's futures cannot be cancelled.
        return False


def _advice(error: BaseException) -> str:
    if isinstance(error, _cancellations()):
        return "Its calls were cancelled by someone else: keep the executor open until the batch is done."
    if isinstance(error, BrokenExecutor):
        return f"{DEAD_WORKER} Make a new executor, and look at what the worker printed."
    # Dask's is no BrokenExecutor, because Dask goes on with other workers.
    if type(error).__name__ == "KilledWorker":
        return f"{DEAD_WORKER} The executor is as good as before, but this call has cost it several workers."
    if isinstance(error, pickle.PicklingError) or any(word in str(error).lower() for word in PICKLING):
        return (
            "The function, its arguments and its results must be picklable: define the function at the top level of a "
            "module, or use an executor that pickles by value (loky, Dask), or threads."
        )
    if "shutdown" in str(error) or "shut down" in str(error):
        return (
            "It was shut down too early: keep it open until the results are there (jax.block_until_ready inside its "
            "`with` block)."
        )
    return "This is no exception of the function itself: see the documentation of the executor."
