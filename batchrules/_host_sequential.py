"""Run the elements of a batch one by one: in a loop that is as bare as can be, or by an executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from batchrules._dispatch import Job
from batchrules._host_context import HostTask
from batchrules._host_run import Run

Element = tuple[int, tuple[Any, ...]]


def run(this: Run) -> None:
    """Call each element that is chosen."""
    elements = _elements(this)
    if this.frame.site.conduct.dispatch.executor is not None:
        _dispatched(this, elements)
        return
    if not this.frame.site.simple or this.keeps_going:
        _loop(this, elements)
        return
    # The first call alone runs under the guard.
    _loop(this, [next(elements)])
    function = this.frame.site.bare()
    if function is None:
        _loop(this, elements)
    else:
        _loop_simple(this, function, elements)


def _elements(this: Run) -> Iterator[Element]:
    if not this.given:
        return ((number, ()) for number in this.numbers)
    rows = zip(*(this.frame.elements.rows(i, x, this.chosen) for i, x in enumerate(this.given)), strict=False)
    return zip(this.numbers, rows, strict=False)


def _loop(this: Run, elements: Iterable[Element]) -> None:
    for number, leaves in elements:
        try:
            this.store(number, this.frame.site.body(leaves))
        except Exception as error:  # noqa: BLE001  # kept, or raised with its place
            this.failed(number, error)


def _loop_simple(this: Run, function: Callable[..., Any], elements: Iterable[Element]) -> None:
    buffer, leaves_of = this.outputs.buffers[0], this.frame.site.body.leaves_of
    dtype, shape = buffer.dtype, buffer.shape[1:]
    number = 0
    try:
        for number, leaves in elements:
            value = function(*leaves)
            exact = type(value) is np.ndarray or isinstance(value, np.generic)
            if exact and value.dtype == dtype and value.shape == shape:
                buffer[number] = value
            else:
                this.store(number, leaves_of(value))
    except Exception as error:  # noqa: BLE001  # raised with its place
        this.failed(number, error)


def _dispatched(this: Run, elements: Iterable[Element]) -> None:
    numbers = this.numbers

    def settle(index: int, values: Any) -> None:
        try:
            this.store(numbers[index], values)
        except Exception as error:  # noqa: BLE001  # kept, or raised with its place
            this.failed(numbers[index], error)

    def failed(index: int, error: BaseException) -> None:
        this.failed(numbers[index], error)

    payloads = (leaves for _, leaves in elements)
    call = HostTask(this.frame.site.body, waits=True)
    job = Job(call, payloads, this.count, settle, failed, keep_going=this.keeps_going, weight=_bytes(this))
    this.frame.site.conduct.dispatch.run(job)


def _bytes(this: Run) -> int:
    return sum(math.prod(result.shape) * result.dtype.itemsize for result in this.frame.site.results)
