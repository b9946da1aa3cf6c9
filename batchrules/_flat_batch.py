"""Calls for many elements at once, in JAX operations: a batch with one leading dimension, whole or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from batchrules import _summed
from batchrules._errors import BatchContractError
from batchrules._methods import Choice, Lead

# A call with the arrays of one element (None) or with arrays that lead as the method says, for so many elements.
Call = Callable[[Sequence[Any], int | None], Sequence[Any]]


@dataclass(eq=False)
class Plan:
    """How a batch is executed.

    Attributes:
        choice: The method, and what each argument leads with.
        batch_size: The most elements that a vectorised call is given, or None.
        where: The function or primitive, for messages.
        results: What each output of one element is: things with `.shape` and `.dtype`.
    """

    choice: Choice
    batch_size: int | None
    where: str
    results: Sequence[Any]


@dataclass(eq=False)
class Output:
    """One output: with the axes in front that it is not summed over; if it depends on no mapped argument, as it is."""

    array: Any
    batched: bool


def merge(arrays: Sequence[Any], replaced: Sequence[bool], replacements: Iterable[Any]) -> list[Any]:
    """The arrays with others in the place of those that are replaced."""
    source = iter(replacements)
    return [next(source) if replace else array for array, replace in zip(arrays, replaced, strict=True)]


@dataclass(eq=False)
class FlatBatch:
    """A batch with one leading dimension: mapped arrays lead with it, the others are still single.

    `sums` says for each output whether it is the sum over the batch. Then each call's share is added up at once.
    """

    call: Call
    arrays: Sequence[Any]
    mapped: Sequence[bool]
    plan: Plan
    sums: Sequence[bool]

    def run(self, size: int) -> list[Output]:
        """One call for the whole batch."""
        outputs = zip(self._part(self._mapped(), size), self.plan.results, self.sums, strict=True)
        # A batch of one cannot show whether an output depends on it. Unmapped is the answer that serves every
        # out_axes, and the one that larger batches give.
        may_lack_axes = self.plan.choice.method == "expand_dims"
        return [
            _total(array, None, result)
            if is_sum
            else Output(array, batched=not may_lack_axes or (size > 1 and array.shape[0] == size))
            for array, result, is_sum in outputs
        ]

    def run_chunks(self, size: int, chunk: int) -> list[Output]:
        """As many calls as the chunk size asks for; a shorter last one for what remains."""
        full = size // chunk
        stacked = [lax.reshape(x[: full * chunk], (full, chunk, *x.shape[1:])) for x in self._mapped()]
        totals = [
            _summed.zero(result.shape, result.dtype, self.arrays) if is_sum else None
            for result, is_sum in zip(self.plan.results, self.sums, strict=True)
        ]
        head = _summed.scan(lambda rows: self._part(rows, chunk), stacked, totals)
        tail = [x[full * chunk :] for x in self._mapped()]
        last = self._part(tail, size - full * chunk) if full * chunk < size else [None] * len(head)
        parts = zip(head, last, self.plan.results, self.sums, strict=True)
        return [
            _total(array, end, result) if is_sum else _joined(array, end, chunk) for array, end, result, is_sum in parts
        ]

    def _part(self, rows: Sequence[Any], size: int) -> list[Any]:
        outputs = zip(self._call(rows, size), self.sums, strict=True)
        return [_summed.over_rows(array, size) if is_sum else array for array, is_sum in outputs]

    def _mapped(self) -> list[Any]:
        return [array for array, is_mapped in zip(self.arrays, self.mapped, strict=True) if is_mapped]

    def _call(self, rows: Sequence[Any], size: int) -> list[Any]:
        given = rows if all(self.mapped) else merge(self.arrays, self.mapped, rows)
        leads = self.plan.choice.leads
        led = [
            x if is_mapped else _led(x, lead, size)
            for x, is_mapped, lead in zip(given, self.mapped, leads, strict=True)
        ]
        outputs = list(self.call(led, size))
        if len(outputs) != len(self.plan.results):
            raise BatchContractError(
                f"{self.plan.where} gives {len(self.plan.results)} outputs for one element, and gave {len(outputs)} "
                f"for a batch of {size} (method {self.plan.choice.method!r}). It must give the same outputs, with a "
                "leading dimension more."
            )
        for position, output in enumerate(outputs):
            if not self._keeps_promise(position, output, size):
                raise self._broken_promise(position, output, size, led)
        return outputs

    def _keeps_promise(self, position: int, output: Any, size: int) -> bool:
        shape, promised = output.shape, self.plan.results[position]
        leads_right = shape[:1] == (size,) or (shape[:1] == (1,) and self.plan.choice.method == "expand_dims")
        return leads_right and shape[1:] == promised.shape and output.dtype == promised.dtype

    def _broken_promise(self, position: int, output: Any, size: int, given: Sequence[Any]) -> BatchContractError:
        method = self.plan.choice.method
        leads = dict.fromkeys((size, 1) if method == "expand_dims" else (size,))
        expected = " or ".join(str((lead, *self.plan.results[position].shape)) for lead in leads)
        shapes = ", ".join(str(tuple(array.shape)) for array in given)
        return BatchContractError(
            f"{self.plan.where} was given a batch of {size} elements at once (method {method!r}), with operands of "
            f"shape {shapes}, and output {position} has shape {tuple(output.shape)} and dtype {output.dtype}: expected "
            f"{expected} and {self.plan.results[position].dtype}. Make it handle a leading "
            "dimension (for a primitive whose parameters hold shapes, with update_params), or use "
            "method='sequential'."
        )


def _total(array: Any, end: Any, result: Any) -> Output:
    """The sum over all chunks and what remained."""
    total = array if end is None else _summed.plus(array, end)
    return Output(total.astype(result.dtype), batched=True)


def _joined(array: Any, end: Any, chunk: int) -> Output:
    """The stacked chunks, and what remained, one after the other."""
    if array.shape[1] != chunk:
        return Output(array[0], batched=False)
    flat = lax.reshape(array, (array.shape[0] * chunk, *array.shape[2:]))
    return Output(flat if end is None else lax.concatenate([flat, end], 0), batched=True)


def _led(array: Any, lead: Lead, size: int) -> Any:
    if lead is Lead.NOTHING:
        return array
    return lax.broadcast(array, (size if lead is Lead.BATCH else 1,))
