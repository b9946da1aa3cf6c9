"""Calls that tell how long they took and how much they moved, in whatever thread, process or machine they are made."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batchrules._dispatch_tasks import Carried


@dataclass(frozen=True, slots=True)
class Measure:
    """What was measured of a call.

    Attributes:
        start: When it started: by `time.perf_counter` in this process, by `time.time` in another one.
        duration: The seconds it took.
        worker: The thread that made it, or the process and host.
        bytes_in: The bytes of the arrays that it was given.
        bytes_out: The bytes of the arrays that it gave.
    """

    start: float
    duration: float
    worker: str | Far
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class Far:
    """A worker that is not in the process of the caller."""

    host: str
    process: int
    thread: str

    def __str__(self) -> str:
        """A name for it, as short as it can be."""
        where = "" if self.host == socket.gethostname() else f"{self.host}, "
        thread = "" if self.thread == threading.main_thread().name else f", {self.thread}"
        return f"{where}process {self.process}{thread}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call gave in another process, with what was measured of it."""

    value: Any
    measure: Measure


class MeasuredError(Exception):
    """A failure on its way from another process, with what was measured of the call."""

    def __init__(self, carried: Carried, measure: Measure) -> None:
        super().__init__(carried, measure)
        self.carried = carried
        self.measure = measure


Tell = Callable[[int, Measure, BaseException | None], None]


class Measured:
    """A call that is measured. Its payload is that of the call it wraps, after the number of it.

    In this process it tells at once. In another one, where there is nobody to tell, the measure travels with the
    outcome: as a `Reply`, or as a `MeasuredError`.

    Args:
        call: What is measured.
        weights: For each output, the bytes of one that is a Python number and no array.
        tell: Who is told.
    """

    __slots__ = ("_call", "_tell", "_weights")

    def __init__(self, call: Callable[[Any], Any], weights: Sequence[int], tell: Tell | None) -> None:
        self._call = call
        self._weights = weights
        self._tell = tell

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever listens is here and not there.
        return Measured, (self._call, self._weights, None)

    def __call__(self, payload: tuple[int, Sequence[Any]]) -> Any:
        """Make the call."""
        number, leaves = payload
        return self._there(leaves) if self._tell is None else self._here(self._tell, number, leaves)

    def _here(self, tell: Tell, number: int, leaves: Sequence[Any]) -> Any:
        worker, start = threading.current_thread().name, time.perf_counter()
        try:
            value = self._call(leaves)
        except BaseException as error:
            tell(number, Measure(start, time.perf_counter() - start, worker, _bytes_in(leaves), 0), error)
            raise
        duration = time.perf_counter() - start
        tell(number, Measure(start, duration, worker, _bytes_in(leaves), self._bytes_out(value)), None)
        return value

    def _there(self, leaves: Sequence[Any]) -> Reply:
        worker = Far(socket.gethostname(), os.getpid(), threading.current_thread().name)
        # Of the clocks only this one means the same in all processes; it may be set meanwhile, so it times nothing.
        start, began = time.time(), time.perf_counter()
        try:
            value = self._call(leaves)
        except Exception as error:  # noqa: BLE001  # carried to the calling process, which raises it
            measure = Measure(start, time.perf_counter() - began, worker, _bytes_in(leaves), 0)
            raise MeasuredError(Carried(error), measure) from None
        duration = time.perf_counter() - began
        return Reply(value, Measure(start, duration, worker, _bytes_in(leaves), self._bytes_out(value)))

    def _bytes_out(self, values: Sequence[Any]) -> int:
        return sum(_weight(value, weight) for value, weight in zip(values, self._weights, strict=True))


def _bytes_in(leaves: Sequence[Any]) -> int:
    return sum(leaf.nbytes for leaf in leaves)


def _weight(value: Any, otherwise: int) -> int:
    """The bytes of an output: none where a derivative is None, for zero; those promised for a Python number."""
    return 0 if value is None else getattr(value, "nbytes", otherwise)


class Arrivals:
    """Places what was measured by other clocks on ours: no call starts before it was sent, or ends after it came back.

    The calls of one worker are moved together, and no more than that takes.
    """

    def __init__(self) -> None:
        self._shifts: dict[Any, float] = {}
        self._ahead = time.time() - time.perf_counter()

    def placed(self, measure: Measure, sent: float) -> float:
        """When a call started, by `time.perf_counter` of this process."""
        arrived = time.perf_counter()
        start = measure.start - self._ahead
        latest, earliest = arrived - measure.duration - start, sent - start
        shift = min(max(self._shifts.get(measure.worker, 0.0), earliest), latest)
        self._shifts[measure.worker] = shift
        return start + shift
