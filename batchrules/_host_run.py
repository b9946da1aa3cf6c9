"""One run of a recorded batch: the arrays, the elements that are called, the outputs, and what failed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchrules._errors import FailedElementsWarning
from batchrules._events import Telling
from batchrules._failures import OWN_ERRORS, message_of
from batchrules._host_context import HostTask
from batchrules._host_elements import Array, Chosen, Outputs
from batchrules._host_frame import Frame, Shapes
from batchrules._host_results import read_only_error

_SHOWN = 8


@dataclass(eq=False)
class Run:
    """One run.

    Attributes:
        frame: What stays the same from run to run.
        given: The arguments, with their mapped axes in front.
        chosen: The flat numbers of the elements that are called; None for all.
        outputs: The outputs so far.
        telling: What tells those who listen; None if nobody does.
    """

    frame: Frame
    given: Sequence[Array]
    chosen: Chosen
    outputs: Outputs
    telling: Telling | None = None
    _failed: list[int] = field(default_factory=list)
    _first: BaseException | None = None

    @property
    def count(self) -> int:
        """How many elements are called."""
        return self.frame.elements.count if self.chosen is None else len(self.chosen)

    @property
    def numbers(self) -> Sequence[int]:
        """The flat numbers of the elements that are called."""
        return range(self.frame.elements.count) if self.chosen is None else self.chosen.tolist()

    @property
    def keeps_going(self) -> bool:
        """Whether a failure leaves the other elements be."""
        return self.frame.site.conduct.on_error == "nan"

    @property
    def task(self) -> Callable[[Sequence[Any]], Any]:
        """What makes one call."""
        body, conduct = self.frame.site.body, self.frame.site.conduct
        # A function that may use JAX is called in order, in this thread, with nothing around it.
        return body if conduct.allow_jax else HostTask(body, waits=conduct.dispatch.executor is not None)

    def start_over(self) -> None:
        """Forget all outputs and failures."""
        if self.telling is not None:
            self.telling = self.telling.again(self.count, 0)
        self.outputs.clear()
        self._failed.clear()
        self._first = None

    def one_by_one(self, numbers: Sequence[int]) -> Run:
        """The run of some of its elements that a call for all of them has failed for."""
        telling = None if self.telling is None else self.telling.again(len(numbers), len(numbers))
        return Run(self.frame, self.given, np.asarray(numbers), self.outputs, telling, self._failed)

    def store(self, number: int, values: Sequence[object]) -> None:
        """Take the results of one element."""
        for output, value in enumerate(values):
            if value is not None:
                self.outputs.store(number, output, self.frame.result(output, value, number))

    def failed(self, number: int, error: BaseException) -> None:
        """Raise the failure of an element, or make it NaN."""
        if not self._may_be_nan(error):
            self.frame.fail(error, number)
        self.outputs.fail(number)
        self._failed.append(number)
        self._first = self._first or error

    def failed_many(self, numbers: Sequence[int], error: BaseException, shapes: Shapes) -> None:
        """Raise the failure of a call for several elements; returns if each of them is to be tried on its own."""
        if not self._may_be_nan(error):
            self.frame.fail_many(error, (numbers[0], numbers[-1]), shapes)
        self._first = self._first or error

    def _may_be_nan(self, error: BaseException) -> bool:
        # A broken promise concerns all elements, and what is no Exception was not meant for us.
        if not self.keeps_going or not isinstance(error, Exception) or isinstance(error, OWN_ERRORS):
            return False
        return read_only_error(self.frame.site.name, error) is None

    def warn(self) -> None:
        """Warn once if elements failed."""
        if self._first is None or not self._failed:
            return
        places = [str(place) for place in sorted({self.frame.place(number) for number in self._failed})]
        listed = ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
        of = self.count // self.frame.points
        which = (
            "the call failed" if places == ["()"] else f"{len(places)} of {of} elements failed: {listed}{self.frame.of}"
        )
        first = f"{type(self._first).__name__}: {message_of(self._first)}"
        text = f"{self.frame.site.name}: {which}. They are NaN now (on_error='nan'). The first failure: {first}"
        warnings.warn(text, FailedElementsWarning, stacklevel=2)
