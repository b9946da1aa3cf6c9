"""Loops over a batch whose outputs are stacked, or added up in one buffer of an element's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from batchrules import _jax_versions, _precision


def zero(shape: tuple[int, ...], dtype: Any, beside: Sequence[Any]) -> Any:
    """What a sum starts from: zeros that vary over the devices as these arrays do."""
    axes = frozenset[Any]().union(*(_jax_versions.varying_axes(jax.typeof(array)) for array in beside))
    return _jax_versions.cast_varying(jnp.zeros(shape, _dtype_of_sum(dtype)), axes)


def over_rows(array: Any, size: int) -> Any:
    """The sum of so many rows, in the dtype of a sum; an array that leads with 1 is the same in all rows."""
    return jnp.broadcast_to(array, (size, *array.shape[1:])).sum(0, dtype=_dtype_of_sum(array.dtype))


def plus(total: Any, value: Any) -> Any:
    """The sum so far, with one value more."""
    axes = _jax_versions.varying_axes(jax.typeof(total))
    return total + _jax_versions.cast_varying(value.astype(total.dtype), axes)


def scan(
    step: Callable[[Sequence[Any]], Sequence[Any]], rows: Sequence[Any], totals: Sequence[Any], *, unroll: bool = False
) -> list[Any]:
    """The outputs of a step for each row.

    Args:
        step: What gives the outputs for one row.
        rows: The arrays whose rows these are.
        totals: For each output, None to have it stacked, or what its sum starts from.
        unroll: Whether the loop is unrolled in the program.

    Returns:
        For each output, the stack of all rows or the sum.
    """
    is_summed = [total is not None for total in totals]

    def body(sums: list[Any], row: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        outputs = list(zip(step(row), is_summed, strict=True))
        values = [output for output, summed in outputs if summed]
        return list(map(plus, sums, values)), [output for output, summed in outputs if not summed]

    start = [total for total in totals if total is not None]
    sums, stacks = map(iter, lax.scan(body, start, list(rows), unroll=unroll))
    return [next(sums) if summed else next(stacks) for summed in is_summed]


def _dtype_of_sum(dtype: Any) -> Any:
    """Numbers of 16 bits and fewer are summed in 32."""
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and _precision.bits(jnp.dtype(dtype)) < 32
    return jnp.dtype(jnp.float32) if is_narrow else jnp.dtype(dtype)
