"""Who listens to the calls of foreign code, and what they are told. Where nobody listens, nothing is done.

A run that starts while nobody listens is not heard later either: its calls are made in the fastest way there is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from batchrules._dispatch_pool import Job
from batchrules._failures import message_of
from batchrules._host_body import HostBody, Primal
from batchrules._host_endpoints import GivenCotangent, GivenJacobian, GivenTangent
from batchrules._measured import Arrivals, Measure, Measured, MeasuredError, Reply
from batchrules._values import name_in

if TYPE_CHECKING:
    from batchrules._host_frame import Frame
    from batchrules._host_site import HostSite


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """One call of foreign code on the host.

    Attributes:
        name: The name of the function.
        endpoint: `"call"` for the function itself, or the derivative: `"jvp"`, `"vjp"`, `"jacobian"`; `"vjp.jvp"` is
            the `jvp` of the `vjp` endpoint. Finite differences call the function itself.
        method: What the call was given: `"sequential"` (one element), `"expand_dims"`, `"broadcast_all"` or
            `"legacy_vectorized"`.
        elements: How many elements it was given; 1 for a single call.
        first: The index of its first element, one number for each mapped axis; as in messages of failures, within
            a device's shard where the batch is sharded.
        last: The index of its last element.
        start: When it started, in seconds since the record began.
        duration: The seconds it took.
        worker: The name of the thread that made it, or the process (and host) of an executor that lives elsewhere.
        bytes_in: The sum of `nbytes` of the arrays it was given. A broadcast view counts with its full shape.
        bytes_out: The sum of `nbytes` of the arrays it gave back; 0 if it failed.
        failure: None, or what it raised: `"ValueError: no convergence"`.
        purpose: `"batch"`; `"check"`: an element called on its own to check a vectorised call; `"retry"`: an element
            called on its own after a vectorised call that failed or was not one of a batch.

    Example:
        >>> import numpy as np, batchrules
        >>> sine = batchrules.host_call(np.sin, lambda x: x, name="sine")
        >>> with batchrules.record() as log:
        ...     result = sine(np.float32(1.0))
        >>> call = log.calls[0]
        >>> call.name, call.endpoint, call.elements, call.bytes_out, call.failure
        ('sine', 'call', 1, 4, None)
    """

    name: str
    endpoint: str
    method: str
    elements: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    start: float
    duration: float
    worker: str
    bytes_in: int
    bytes_out: int
    failure: str | None
    purpose: str


class Listener(Protocol):
    """What is told of calls, from whatever thread. `start` of a call is by `time.perf_counter`."""

    def started(self, name: str, elements: int) -> None:
        """A run is about to call so many elements."""
        ...

    def again(self, elements: int, failed: int) -> None:
        """It is about to call so many elements once more, of which so many have failed."""
        ...

    def heard(self, call: RecordedCall) -> None:
        """A call has returned or failed."""
        ...

    def ended(self) -> None:
        """A run has ended, or failed."""
        ...


# Never bound anew: the paths of small calls hold the list itself.
LISTENERS: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, a listener is told of every call of runs that start inside."""
    LISTENERS.append(listener)
    try:
        yield
    finally:
        LISTENERS.remove(listener)


def telling(frame: Frame) -> Telling | None:
    """What tells of a run's calls; None if nobody listens."""
    own = frame.site.conduct.progress if frame.axes else None
    if own is None and not LISTENERS:
        return None
    # A copy: who stops listening is told of this run's calls to its end, and knows that it has stopped.
    listeners = (*LISTENERS, *(() if own is None else (own,)))
    return Telling(listeners, frame) if listeners else None


@dataclass(frozen=True, slots=True)
class Span:
    """The elements of a call: the flat numbers of the first and the last, and how many."""

    first: int
    last: int
    elements: int = 1


@dataclass(frozen=True, eq=False)
class Telling:
    """Tells the listeners of one run's calls."""

    listeners: Sequence[Listener]
    frame: Frame
    purpose: str = "batch"

    @contextlib.contextmanager
    def during(self, elements: int) -> Iterator[None]:
        """Around a run: so many elements will be called."""
        for listener in self.listeners:
            listener.started(self.frame.site.name, elements)
        try:
            yield
        finally:
            for listener in self.listeners:
                listener.ended()

    def again(self, elements: int, failed: int) -> Telling:
        """Tell that so many elements are called once more, of which so many have failed."""
        for listener in self.listeners:
            listener.again(elements, failed)
        return replace(self, purpose="retry")

    def alone(self, leaves: Sequence[Any]) -> list[Any]:
        """Make a single call, and tell of it."""
        said = _Said(self, "sequential", lambda _: Span(0, 0))
        with self.during(1):
            return Measured(self.frame.site.body, said.weights, said.here)((0, leaves))

    def told(self, job: Job, span: Callable[[int], Span], method: str = "sequential", purpose: str = "") -> Job:
        """A job of whose calls the listeners are told.

        Args:
            job: The job.
            span: The elements of each of its calls.
            method: What its calls are given.
            purpose: Why they are made, if not for the run's own purpose.
        """
        said = _Said(replace(self, purpose=purpose) if purpose else self, method, span)
        call = Measured(job.call, said.weights, said.here)
        sent = said.sent(job.payloads)
        return replace(job, call=call, payloads=sent, settle=said.settling(job), failed=said.failing(job))


class _Said:
    """What the listeners are told of the calls of one job."""

    def __init__(self, telling: Telling, method: str, span: Callable[[int], Span]) -> None:
        self._telling = telling
        self._method = method
        self._span = span
        self._name, self._endpoint = name_and_endpoint(telling.frame.site)
        self._arrivals = Arrivals()
        self._sent: dict[int, float] = {}
        results = telling.frame.site.results
        self.weights = [math.prod(result.shape) * result.dtype.itemsize for result in results]

    def here(self, index: int, measure: Measure, error: BaseException | None) -> None:
        """Tell of a call."""
        span, place = self._span(index), self._telling.frame.place
        first = place(span.first)
        call = RecordedCall(
            name=self._name,
            endpoint=self._endpoint,
            method=self._method,
            elements=span.elements,
            first=first,
            last=first if span.last == span.first else place(span.last),
            start=measure.start,
            duration=measure.duration,
            worker=str(measure.worker),
            bytes_in=measure.bytes_in,
            bytes_out=measure.bytes_out,
            failure=None if error is None else f"{type(error).__name__}: {message_of(error)}",
            purpose=self._telling.purpose,
        )
        for listener in self._telling.listeners:
            listener.heard(call)

    def _there(self, index: int, measure: Measure, sent: float, error: BaseException | None = None) -> None:
        """Tell of a call that was timed by another clock."""
        start = self._arrivals.placed(measure, sent)
        self.here(index, replace(measure, start=start), error)

    def sent(self, payloads: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The payloads with their numbers; each is taken when it is sent."""
        for index, payload in enumerate(payloads):
            self._sent[index] = time.perf_counter()
            yield index, payload

    def settling(self, job: Job) -> Callable[[int, Any], None]:
        """What takes the values."""

        def settle(index: int, value: Any) -> None:
            sent = self._sent.pop(index)
            if isinstance(value, Reply):
                self._there(index, value.measure, sent)
                value = value.value
            job.settle(index, value)

        return settle

    def failing(self, job: Job) -> Callable[[int, BaseException], None]:
        """What takes the failures."""

        def failed(index: int, error: BaseException) -> None:
            sent = self._sent.pop(index)
            if isinstance(error, MeasuredError):
                measure, error = error.measure, error.carried.arrived()
                self._there(index, measure, sent, error)
            job.failed(index, error)

        return failed


_ENDPOINTS = {GivenTangent: "jvp", GivenCotangent: "vjp", GivenJacobian: "jacobian"}


def name_and_endpoint(site: HostSite) -> tuple[str, str]:
    """The name of the user's function, and which of its endpoints a site calls."""
    body: HostBody = site.body
    endpoints: list[str] = []
    while not isinstance(body, Primal):
        if type(body) in _ENDPOINTS:
            endpoints.append(_ENDPOINTS[type(body)])
        body = body.of  # pyright: ignore[reportAttributeAccessIssue]  # all but the function itself are made of another
    return name_in(body.name), ".".join(reversed(endpoints)) or "call"
