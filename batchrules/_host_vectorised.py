"""Run a batch in calls that are given many elements at once, and check that they treat them one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchrules import _host_results, _host_sequential, _host_verify
from batchrules._dispatch_pool import Job
from batchrules._errors import BatchContractError, BatchContractWarning
from batchrules._events import Span
from batchrules._host_elements import Array
from batchrules._host_results import BatchGiven
from batchrules._host_run import Run
from batchrules._host_verify import Batch
from batchrules._methods import Lead


def run(this: Run) -> bool:
    """Run the batch; False if `auto` chose a method that the function turns out not to follow."""
    try:
        _Chunks(this).run()
    except BatchContractError as error:
        site = this.frame.site
        if site.request.method != "auto":
            this.frame.surface(error)
        if site.trust.distrust(site):
            text = f"{error} As 'auto' was asked for, it is called one element at a time from now on."
            warnings.warn(text, BatchContractWarning, stacklevel=2)
        return False
    return True


class _Chunks:
    """The calls of a batch, each for so many elements."""

    def __init__(self, this: Run) -> None:
        self._this = this
        self._site = this.frame.site
        self._leads = this.frame.choice.leads
        self._size = min(self._site.batch_size or this.count, this.count)
        self._to_check: tuple[int, Batch, tuple[int, ...]] | None = None
        self._starts = range(0, this.count, self._size)
        self._failed_numbers: list[int] = []
        # What is known of a function holds for the arguments that were mapped then, and varied, and no others.
        dtypes = tuple(array.dtype.str for array in this.given)
        self._key = self._site, tuple(this.frame.element_shapes), dtypes, this.frame.choice.method, this.frame.mapped
        # How many calls ago it passed for the first time, if it is to be checked now.
        self._due = None if self._site.conduct.verify is False else self._site.trust.due(self._key, self._varies)

    def run(self) -> None:
        """Make the calls."""
        payloads = (self._arrays(index) for index in range(len(self._starts)))
        this, count = self._this, len(self._starts)
        job = Job(this.task, payloads, count, self._settle, self._failed, keep_going=this.keeps_going)
        if this.telling is not None:
            job = this.telling.told(job, self._span, this.frame.choice.method)
        self._site.conduct.dispatch.run(job)
        if self._to_check is not None:
            self._verify(*self._to_check)
        if self._failed_numbers:
            # on_error="nan": only the elements that fail are NaN, and a call tells nothing of which these are.
            _host_sequential.run(self._this.one_by_one(sorted(self._failed_numbers)))

    def _bounds(self, index: int) -> tuple[int, int]:
        return self._starts[index], min(self._starts[index] + self._size, self._this.count)

    def _span(self, index: int) -> Span:
        start, stop = self._bounds(index)
        chosen = self._this.chosen
        first, last = (start, stop - 1) if chosen is None else (int(chosen[start]), int(chosen[stop - 1]))
        return Span(first, last, stop - start)

    def _arrays(self, index: int) -> list[Array]:
        """What a call is given; gathered for each call alone, so that batch_size bounds the memory."""
        start, stop = self._bounds(index)
        numbers = slice(start, stop) if self._this.chosen is None else self._this.chosen[start:stop]
        led = self._this.frame.elements.led
        pairs = enumerate(zip(self._this.given, self._leads, strict=True))
        return [led(i, array, lead, numbers) for i, (array, lead) in pairs]

    def _shapes(self, size: int) -> tuple[tuple[int, ...], ...]:
        sizes = {Lead.BATCH: (size,), Lead.ONE: (1,), Lead.NOTHING: ()}
        pairs = zip(self._leads, self._this.frame.element_shapes, strict=True)
        return tuple((*sizes[lead], *shape) for lead, shape in pairs)

    def _settle(self, index: int, values: Sequence[Any]) -> None:
        start, stop = self._bounds(index)
        results = self._checked(values, stop - start)
        if self._due is not None and self._to_check is None and stop - start > 1:
            self._choose_rows(index, results, self._due)
        numbers = slice(start, stop) if self._this.chosen is None else self._this.chosen[start:stop]
        for output, value in enumerate(results):
            # The check calls the function again, which may use the same buffer for its result.
            self._this.outputs.store_many(numbers, output, value, keep=self._to_check is None)

    def _choose_rows(self, index: int, results: Sequence[Array], calls: int) -> None:
        start, stop = self._bounds(index)
        batch = Batch(self._this.frame.choice.method, stop - start, self._arrays(index), self._leads, {})
        first = _host_verify.first_row(batch.size, calls)
        if (rows := _host_verify.differing_rows(batch, first)) is not None:
            kept = {row: [np.array(result[row]) for result in results] for row in rows}
            self._to_check = start, replace(batch, outputs=kept), rows

    def _failed(self, index: int, error: BaseException) -> None:
        start, stop = self._bounds(index)
        numbers = self._this.numbers[start:stop]
        self._this.failed_many(numbers, error, self._shapes(stop - start))
        self._failed_numbers.extend(numbers)

    def _checked(self, values: Sequence[Any], size: int) -> list[Array]:
        """The outputs of a call; every one leads with the size of the batch."""
        given = BatchGiven(self._this.frame.choice.method, size, self._shapes(size))
        return [self._as_batch(output, value, given) for output, value in enumerate(values)]

    def _as_batch(self, output: int, value: Any, given: BatchGiven) -> Array:
        promised = self._site.results[output]
        where = f" with a batch of {given.size} elements"
        array = np.zeros((1, *promised.shape), promised.dtype)
        if value is not None:
            array = _host_results.as_array(self._site, output, value, where)
            if self._leads_with_nothing:
                # Only the mask of `where` is mapped: this is one element, and all are equal.
                _host_results.check_element(self._site, output, array, where)
                array = array[None]
            else:
                _host_results.check_batch(self._site, output, array, given)
        return np.broadcast_to(array, (given.size, *promised.shape))

    @property
    def _leads_with_nothing(self) -> bool:
        return all(lead is Lead.NOTHING for lead in self._leads)

    def _varies(self, argument: int) -> bool:
        """Whether the ends of an argument differ: a quick look, for each call."""
        ends = self._this.frame.elements.ends(argument, self._this.given[argument])
        return ends is not None and _host_verify.differs(ends, 0, -1)

    def _verify(self, start: int, batch: Batch, rows: tuple[int, ...]) -> None:
        this = self._this
        alone: list[Any] = [None] * len(rows)

        def settle(index: int, values: Any) -> None:
            # A copy, because the next call may use the same buffer.
            alone[index] = [value.copy() if isinstance(value, np.ndarray) else value for value in values]

        def failed(index: int, error: BaseException) -> None:
            if this.keeps_going:
                return
            raise _host_verify.failed_alone(self._site, batch, rows[index], error) from error

        elements = [batch.element(row) for row in rows]
        job = Job(this.task, elements, len(rows), settle, failed, keep_going=this.keeps_going)
        if this.telling is not None:
            numbers = [this.numbers[start + row] for row in rows]
            job = this.telling.told(job, lambda index: Span(numbers[index], numbers[index]), purpose="check")
        self._site.conduct.dispatch.run(job)
        if None in alone:
            return  # It failed on its own, as elements may here, and the question stays open.
        for row, values in zip(rows, alone, strict=True):
            _host_verify.check(self._site, batch, row, values)
        still = [i for i, is_mapped in enumerate(this.frame.mapped) if is_mapped and not batch.varies(i, rows)]
        self._site.trust.passed(self._key, frozenset(still))
