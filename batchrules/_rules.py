"""Execute a batch of any opaque call in JAX operations: loops, broadcasts and reshapes around the call.

The other executor of the same vocabulary is `_host_runner`, in NumPy. One property test runs both on every case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from batchrules import _batch, _summed
from batchrules._batch import Axes, OutAxis
from batchrules._flat_batch import Call, FlatBatch, Output, Plan, merge


def run(call: Call, axes: Axes, arrays: Sequence[Any], plan: Plan) -> list[Output]:
    """Execute a batch. The arrays come with their mapped axes in front, unmapped ones without."""
    if not axes:
        return [Output(array, batched=False) for array in call(arrays, None)]
    if _batch.count(axes) == 0:
        return [_no_elements(result, axes, j) for j, result in enumerate(plan.results)]
    if plan.choice.vectorised:
        return _vectorised(call, axes, arrays, plan)
    outputs = _loop(call, axes, arrays, plan)
    if not any(axis.outputs for axis in axes):
        return [Output(array, batched=True) for array in outputs]
    # What was summed is in the dtype of a sum yet.
    results = zip(outputs, plan.results, strict=True)
    return [Output(array.astype(result.dtype), batched=True) for array, result in results]


def to_front(array: Any, dim: int | None) -> Any:
    """The array with its mapped axis in front; an unmapped array as it is."""
    if dim is None or dim == 0:
        return array
    return lax.transpose(array, (dim, *(i for i in range(array.ndim) if i != dim)))


def _no_elements(result: Any, axes: Axes, output: int) -> Output:
    """The output of an empty batch, which makes no call."""
    return Output(jnp.zeros(_unsummed_shape(axes, output, result), result.dtype), batched=True)


def _unsummed_shape(axes: Axes, output: int, result: Any) -> tuple[int, ...]:
    """The shape of an output with all axes but those that it is summed over."""
    return (*(axis.size for axis in axes if axis.output(output) is not OutAxis.SUMMED), *result.shape)


def _loop(call: Call, axes: Axes, arrays: Sequence[Any], plan: Plan) -> Sequence[Any]:
    """One loop for each axis, the outermost first."""
    if not axes:
        return call(arrays, None)
    axis, inner = axes[0], axes[1:]
    mapped = [array for array, batched in zip(arrays, axis.in_batched, strict=True) if batched]
    totals = [
        _summed.zero(_unsummed_shape(inner, j, result), result.dtype, arrays)
        if axis.output(j) is OutAxis.SUMMED
        else None
        for j, result in enumerate(plan.results)
    ]

    def step(rows: Sequence[Any]) -> Sequence[Any]:
        return _loop(call, inner, merge(arrays, axis.in_batched, rows), plan)

    return _summed.scan(step, mapped, totals, unroll=plan.choice.method == "sequential_unrolled")


def _vectorised(call: Call, axes: Axes, arrays: Sequence[Any], plan: Plan) -> list[Output]:
    size = _batch.count(axes)
    mapped = _batch.mapped(axes, len(arrays))
    flat = [_flat(array, axes, i) if mapped[i] else array for i, array in enumerate(arrays)]
    chunk = plan.batch_size or size
    sums = [all(axis.output(j) is OutAxis.SUMMED for axis in axes) for j in range(len(plan.results))]
    batch = FlatBatch(call, flat, mapped, plan, sums)
    outputs = batch.run(size) if chunk >= size else batch.run_chunks(size, chunk)
    return [
        output if is_sum else _reduced(_shaped(output, axes), axes, j)
        for j, (output, is_sum) in enumerate(zip(outputs, sums, strict=True))
    ]


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


def _reduced(output: Output, axes: Axes, position: int) -> Output:
    """An output without the axes that it is summed over."""
    over = tuple(p for p, axis in enumerate(axes) if axis.output(position) is OutAxis.SUMMED)
    if not over:
        return output
    array = with_all_axes(output, axes)
    return Output(jnp.sum(array, over, dtype=array.dtype), batched=True)


def with_all_axes(output: Output, axes: Axes) -> Any:
    """The output with all axes, repeated if it depends on none of them."""
    return output.array if output.batched else lax.broadcast(output.array, _batch.sizes(axes))
