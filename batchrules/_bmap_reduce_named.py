"""The reductions with a name: sum, mean, max and min.

Each is a `Reduction` (see `_bmap_reduce`) of one output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from batchrules._bmap_sharding import whole_along_first
from batchrules._jax_versions import cast_varying, varying_axes

# --- sum and mean ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """The sum or the mean of one output, in single precision at least until the end, as in JAX."""

    indices: tuple[int, ...]
    mean: bool
    num_state = 1

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        _check_numbers("mean" if self.mean else "sum", stacked[0])
        total = self._total(stacked)
        return [lax.full_like(total, 0, dtype=_wider(total.dtype))]

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return [state[0] + jnp.sum(chunk[0].astype(state[0].dtype), axis=0)]

    def join_blocks(self, states: Sequence[Any]) -> list[Any]:
        return [jnp.sum(states[0], axis=0, dtype=states[0].dtype)]

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        total = state[0] / size if self.mean else state[0]
        return [total.astype(self._total(stacked).dtype)]

    def _total(self, stacked: Sequence[Any]) -> Any:
        return jax.eval_shape(partial(jnp.mean if self.mean else jnp.sum, axis=0), stacked[0])


def _check_numbers(name: str, stacked: Any) -> None:
    if jnp.issubdtype(stacked.dtype, jax.dtypes.extended):
        raise TypeError(
            f'bmap: reduce="{name}" needs numbers; the function\'s result is {stacked.dtype}'
            f"{list(stacked.shape[1:])}. Stack it (reduce=None for this output)."
        )


def _wider(dtype: Any) -> Any:
    is_half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_half else dtype


# --- max and min -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extremum:
    """The largest or smallest of one output, in single precision at least until the end, for the derivative's sake.

    The state has a count of the elements that attain it, because equal ones share the derivative, as in
    `jax.numpy.max`.
    """

    indices: tuple[int, ...]
    largest: bool
    num_state = 2

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        _check_numbers(self._name, stacked[0])
        shape, dtype = stacked[0].shape[1:], _wider(stacked[0].dtype)
        return [
            jnp.full(shape, _worst(dtype, largest=self.largest), dtype),
            jnp.zeros(shape, _count_dtype(dtype)),
        ]

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        best, count = state
        # Computed once, or else XLA may compute it twice, differently, and then nothing equals the best.
        elements = lax.optimization_barrier(chunk[0].astype(best.dtype))
        one = jnp.ones((), count.dtype)
        return list(_best(self.largest, (best[None], elements), (count[None], one)))

    def join_blocks(self, states: Sequence[Any]) -> list[Any]:
        if jnp.issubdtype(states[0].dtype, jnp.complexfloating):
            # The devices have no way to find the best of these together.
            states = [whole_along_first(x) for x in states]
        best, count = states
        return list(_best(self.largest, (best,), (count,)))

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        if size == 0:
            raise ValueError(
                f'bmap: reduce="{self._name}" of an axis of size 0 has no value; map over at least one element.'
            )
        return [state[0].astype(stacked[0].dtype)]

    @property
    def _name(self) -> str:
        return "max" if self.largest else "min"


def _count_dtype(dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.dtype(jnp.float32)
    return _wider(jnp.finfo(dtype).dtype)


def _worst(dtype: Any, *, largest: bool) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf if largest else jnp.inf
    if dtype == jnp.bool_:
        return not largest
    return jnp.iinfo(dtype).min if largest else jnp.iinfo(dtype).max


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _best(largest: bool, values: Sequence[Any], counts: Sequence[Any]) -> tuple[Any, Any]:  # noqa: FBT001
    """The best of all values, which lie along axis 0 of several arrays, and how many elements attain it.

    Each value is the best of some elements already, which as many of them attain as its count says.
    """
    over, either = (jnp.max, jnp.maximum) if largest else (jnp.min, jnp.minimum)
    best = reduce(either, [over(x, axis=0) for x in values])
    return best, reduce(lax.add, [jnp.sum(x, axis=0) for x in _attaining(best, values, counts)])


def _attaining(best: Any, values: Sequence[Any], counts: Sequence[Any]) -> list[Any]:
    """For each value how many of its elements attain the best."""
    # A product, because explicitly sharded arrays of which one is more spread than the other can be multiplied.
    return [(x == best[None]).astype(n.dtype) * n for x, n in zip(values, counts, strict=True)]


@_best.defjvp
def _best_jvp(largest: bool, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:  # noqa: FBT001
    best, count = _best(largest, *primals)
    # JAX 0.7 gives zeros that do not vary where the others do.
    varying = varying_axes(jax.typeof(best))
    moved = [
        jnp.sum(lax.stop_gradient(n.astype(best.dtype)) * cast_varying(tangent, varying), axis=0)
        for n, tangent in zip(_attaining(best, *primals), tangents[0], strict=True)
    ]
    # Divided at the end, as in JAX, so that devices can add up these and the counts at once.
    share = reduce(lax.add, moved) / lax.stop_gradient(count.astype(best.dtype))
    return (best, count), (share, jnp.zeros_like(count))
