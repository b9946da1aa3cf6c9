"""Issue the calls of a batch: in order, on threads, or on any `concurrent.futures.Executor`. No JAX, no NumPy."""

from __future__ import annotations

import operator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchrules._dispatch_pool import Job


@dataclass(frozen=True, eq=False)
class Dispatch:
    """How the calls of a batch are issued. Compares by value, an executor by identity.

    Args:
        executor: None: in order, in the calling thread. An int: that many threads, made for each batch. An executor:
            only its `submit` is used, and it stays open.
        max_in_flight: The most tasks that are submitted and not finished; None for no bound. A task makes one call
            at a time.
    """

    executor: int | Executor | None = None
    max_in_flight: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dispatch) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        # An executor's own comparison is nothing we know of, and it may have no hash.
        executor = id(self.executor) if isinstance(self.executor, Executor) else self.executor
        return type(self.executor), executor, self.max_in_flight

    def run(self, job: Job) -> None:
        """Make the calls of a job; returns when all of them are settled.

        If `settle` or `failed` raises, or KeyboardInterrupt comes: nothing more is started, what is queued is
        cancelled, what runs is waited for and its results are dropped. A second KeyboardInterrupt ends the waiting.

        Raises:
            DispatchError: The executor failed, not the foreign code.
        """
        # Loaded with the first batch: an import of batchrules need not wait for it.
        from batchrules._dispatch_pool import PoolRun  # noqa: PLC0415
        from batchrules._dispatch_tasks import must_stay_here  # noqa: PLC0415

        if self.executor is None or must_stay_here(self.executor):
            _run_in_order(job)
        elif isinstance(self.executor, Executor):
            PoolRun(job, self.executor, None, self.max_in_flight).run()
        else:
            _run_on_threads(job, min(self.executor, job.count), self.max_in_flight)


def check_dispatch(executor: Any, max_in_flight: Any, where: str) -> Dispatch:
    """Make a `Dispatch` of a user's options.

    Args:
        executor: What the user gave as `executor`.
        max_in_flight: What the user gave as `max_in_flight`.
        where: What messages call the function.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: A number below 1.

    Example:
        >>> check_dispatch(8, None, "norm")
        Dispatch(executor=8, max_in_flight=None)
    """
    bound = None if max_in_flight is None else _whole_number(max_in_flight, "max_in_flight", "no bound", where)
    if executor is None or isinstance(executor, Executor):
        return Dispatch(executor, bound)
    if hasattr(executor, "__index__"):
        return Dispatch(_whole_number(executor, "executor", "calls in order", where), bound)
    hint = " Make an instance of it." if isinstance(executor, type) and issubclass(executor, Executor) else ""
    if hasattr(executor, "get_executor"):
        hint = " Of a Dask client, pass client.get_executor()."
    raise TypeError(
        f"{where}: executor must be None (calls in order), an int (that many threads) or a "
        f"concurrent.futures.Executor; got {executor!r} of type {type(executor).__name__}.{hint}"
    )


def _whole_number(value: Any, option: str, without: str, where: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{where}: {option} must be an int of at least 1, or None for {without}; "
            f"got {value!r} of type {type(value).__name__}."
        )
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{where}: {option} must be at least 1, or None for {without}; got {value!r}.")
    return number


def _run_in_order(job: Job) -> None:
    for index, payload in enumerate(job.payloads):
        try:
            value = job.call(payload)
        except Exception as error:  # noqa: BLE001  # handed over or raised
            job.refuse(index, error)
        else:
            job.settle(index, value)


def _run_on_threads(job: Job, workers: int, limit: int | None) -> None:
    if workers <= 1:
        return _run_in_order(job)
    from batchrules._dispatch_pool import PoolRun  # noqa: PLC0415  # as above
    from batchrules._dispatch_threads import Threads  # noqa: PLC0415  # as above

    pool = Threads(workers)
    run = PoolRun(job, pool, workers, limit)
    try:
        run.run()
    finally:
        # Only a second KeyboardInterrupt leaves something running: whoever sends it does not want to wait.
        pool.shutdown(wait=run.quiet, cancel_futures=True)
    return None
