"""Execute a batch of any opaque call in JAX operations: loops, broadcasts and reshapes around the call.

The other executor of the same vocabulary is `_host_runner`, in NumPy. One property test runs both on every case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from batchrules import _batch
from batchrules._batch import Axes
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
    """One output: with all axes in front, or, where it depends on no mapped argument, as it is."""

    array: Any
    batched: bool


def run(call: Call, axes: Axes, arrays: Sequence[Any], plan: Plan) -> list[Output]:
    """Execute a batch. The arrays come with their mapped axes in front, unmapped ones without."""
    if not axes:
        return [Output(array, batched=False) for array in call(arrays, None)]
    if _batch.count(axes) == 0:
        return [_no_elements(result, axes) for result in plan.results]
    if plan.choice.vectorised:
        return _vectorised(call, axes, arrays, plan)
    unroll = plan.choice.method == "sequential_unrolled"
    return [Output(array, batched=True) for array in _loop(call, axes, arrays, unroll=unroll)]


def to_front(array: Any, dim: int | None) -> Any:
    """The array with its mapped axis in front; an unmapped array as it is."""
    if dim is None or dim == 0:
        return array
    return lax.transpose(array, (dim, *(i for i in range(array.ndim) if i != dim)))


def _no_elements(result: Any, axes: Axes) -> Output:
    """The output of an empty batch, which makes no call."""
    return Output(jnp.zeros((*_batch.sizes(axes), *result.shape), result.dtype), batched=True)


def _loop(call: Call, axes: Axes, arrays: Sequence[Any], *, unroll: bool) -> Sequence[Any]:
    """One loop for each axis, the outermost first."""
    if not axes:
        return call(arrays, None)
    axis, inner = axes[0], axes[1:]
    mapped = [array for array, batched in zip(arrays, axis.in_batched, strict=True) if batched]

    def body(carry: tuple[()], rows: Sequence[Any]) -> tuple[tuple[()], list[Any]]:
        return carry, list(_loop(call, inner, _merge(arrays, axis.in_batched, rows), unroll=unroll))

    return lax.scan(body, (), mapped, unroll=unroll)[1]


def _merge(arrays: Sequence[Any], replaced: Sequence[bool], replacements: Iterable[Any]) -> list[Any]:
    source = iter(replacements)
    return [next(source) if replace else array for array, replace in zip(arrays, replaced, strict=True)]


def _vectorised(call: Call, axes: Axes, arrays: Sequence[Any], plan: Plan) -> list[Output]:
    size = _batch.count(axes)
    mapped = _batch.mapped(axes, len(arrays))
    flat = [_flat(array, axes, i) if mapped[i] else array for i, array in enumerate(arrays)]
    batch = _FlatBatch(call, flat, mapped, plan)
    chunk = plan.batch_size or size
    outputs = batch.run(size) if chunk >= size else batch.run_chunks(size, chunk)
    return [_shaped(output, axes) for output in outputs]


def _flat(array: Any, axes: Axes, argument: int) -> Any:
    """A mapped argument with one leading dimension, the whole batch."""
    if len(axes) == 1:
        return array
    element = _batch.element_shape(axes, argument, array.shape)
    aligned = lax.reshape(array, _batch.aligned_shape(axes, argument, array.shape))
    full = jnp.broadcast_to(aligned, (*_batch.sizes(axes), *element))
    return lax.reshape(full, (_batch.count(axes), *element))


def _shaped(output: Output, axes: Axes) -> Output:
    """A flat output with its axes; one that leads with 1 without them."""
    if not output.batched:
        return Output(lax.squeeze(output.array, (0,)), batched=False)
    if len(axes) == 1:
        return output
    return Output(lax.reshape(output.array, (*_batch.sizes(axes), *output.array.shape[1:])), batched=True)


@dataclass(eq=False)
class _FlatBatch:
    """A batch with one leading dimension: mapped arrays lead with it, the others are still single."""

    call: Call
    arrays: Sequence[Any]
    mapped: Sequence[bool]
    plan: Plan

    def run(self, size: int) -> list[Output]:
        """One call for the whole batch."""
        arrays = self._call(self._mapped(), size)
        if self.plan.choice.method != "expand_dims":
            return [Output(array, batched=True) for array in arrays]
        # A batch of one cannot show whether an output depends on it. Unmapped is the answer that serves every
        # out_axes, and the one that larger batches give.
        return [Output(array, batched=size > 1 and array.shape[0] == size) for array in arrays]

    def run_chunks(self, size: int, chunk: int) -> list[Output]:
        """As many calls as the chunk size asks for; a shorter last one for what remains."""
        full = size // chunk
        stacked = [lax.reshape(x[: full * chunk], (full, chunk, *x.shape[1:])) for x in self._mapped()]
        arrays = lax.scan(lambda carry, rows: (carry, self._call(rows, chunk)), (), stacked)[1]
        batched = [array.shape[1] == chunk for array in arrays]
        head = [
            lax.reshape(x, (full * chunk, *x.shape[2:])) if is_batched else x[0]
            for x, is_batched in zip(arrays, batched, strict=True)
        ]
        if full * chunk == size:
            return [Output(array, batched=is_batched) for array, is_batched in zip(head, batched, strict=True)]
        tail = self._call([x[full * chunk :] for x in self._mapped()], size - full * chunk)
        return [
            Output(lax.concatenate([array, end], 0) if is_batched else array, batched=is_batched)
            for array, end, is_batched in zip(head, tail, batched, strict=True)
        ]

    def _mapped(self) -> list[Any]:
        return [array for array, is_mapped in zip(self.arrays, self.mapped, strict=True) if is_mapped]

    def _call(self, rows: Sequence[Any], size: int) -> list[Any]:
        given = rows if all(self.mapped) else _merge(self.arrays, self.mapped, rows)
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


def with_all_axes(output: Output, axes: Axes) -> Any:
    """The output with all axes, repeated if it depends on none of them."""
    return output.array if output.batched else lax.broadcast(output.array, _batch.sizes(axes))


def _led(array: Any, lead: Lead, size: int) -> Any:
    if lead is Lead.NOTHING:
        return array
    return lax.broadcast(array, (size if lead is Lead.BATCH else 1,))
