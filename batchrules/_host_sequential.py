"""Run the elements of a batch one by one: in a loop that is as bare as can be, or by an executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from batchrules import _host_bare
from batchrules._dispatch_pool import Job
from batchrules._events import Span
from batchrules._host_bare import Bare
from batchrules._host_context import BareTask
from batchrules._host_run import Run

Element = tuple[int, tuple[Any, ...]]


def run(this: Run) -> None:
    """Call each element that is chosen."""
    elements = _elements(this)
    if this.frame.site.conduct.dispatch.executor is None and this.telling is None:
        _in_order(this, elements)
    else:
        _dispatched(this, elements)


def _elements(this: Run) -> Iterator[Element]:
    if not this.given:
        return ((number, ()) for number in this.numbers)
    rows = zip(*(this.frame.elements.rows(i, x, this.chosen) for i, x in enumerate(this.given)), strict=False)
    return zip(this.numbers, rows, strict=False)


def _in_order(this: Run, elements: Iterator[Element]) -> None:
    # The first call alone runs under the guard.
    _loop(this, [next(elements)])
    bare = _bare(this)
    if bare is None:
        _loop(this, elements)
    else:
        _loop_bare(this, bare, elements)


def _bare(this: Run) -> Bare | None:
    """The bare function, where no output is summed and no failure is kept."""
    return None if this.keeps_going or this.outputs.sums else _host_bare.bare(this.frame.site)


def _loop(this: Run, elements: Iterable[Element]) -> None:
    for number, leaves in elements:
        try:
            this.store(number, this.frame.site.body(leaves))
        except Exception as error:  # noqa: BLE001  # kept, or raised with its place
            this.failed(number, error)


def _loop_bare(this: Run, bare: Bare, elements: Iterable[Element]) -> None:
    function, store = bare.function, _storing(this, bare)
    number = 0
    try:
        for number, leaves in elements:
            store(number, function(*leaves))
    except Exception as error:  # noqa: BLE001  # raised with its place
        this.failed(number, error)


def _storing(this: Run, bare: Bare) -> Callable[[int, Any], None]:
    """What takes the result of the bare function for one element."""
    buffer, leaves_of = this.outputs.buffers[0], bare.leaves_of
    dtype, shape = buffer.dtype, buffer.shape[1:]

    def store(number: int, value: Any) -> None:
        # Not what is derived from ndarray: a masked array is no plain array.
        exact = type(value) is np.ndarray or isinstance(value, np.generic)
        if exact and value.dtype == dtype and value.shape == shape:
            buffer[number] = value
        else:
            this.store(number, leaves_of(value))

    return store


def _dispatched(this: Run, elements: Iterable[Element]) -> None:
    numbers = this.numbers
    call, store = _task(this)

    def settle(index: int, values: Any) -> None:
        try:
            store(numbers[index], values)
        except Exception as error:  # noqa: BLE001  # kept, or raised with its place
            this.failed(numbers[index], error)

    def failed(index: int, error: BaseException) -> None:
        this.failed(numbers[index], error)

    payloads = (leaves for _, leaves in elements)
    job = Job(call, payloads, this.count, settle, failed, keep_going=this.keeps_going, weight=_bytes(this))
    if this.telling is not None:
        job = this.telling.told(job, lambda index: Span(numbers[index], numbers[index]))
    this.frame.site.conduct.dispatch.run(job)


def _task(this: Run) -> tuple[Callable[[Any], Any], Callable[[int, Any], None]]:
    """What makes one call, and what takes its result."""
    # Threads of our own; what other executors need (pickling) the bare function need not have.
    is_near = isinstance(this.frame.site.conduct.dispatch.executor, int) and this.telling is None
    bare = _bare(this) if is_near else None
    return (this.task, this.store) if bare is None else (BareTask(bare.function), _storing(this, bare))


def _bytes(this: Run) -> int:
    return sum(math.prod(result.shape) * result.dtype.itemsize for result in this.frame.site.results)
