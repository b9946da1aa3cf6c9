"""The reductions with a name: sum, mean, max and min.

Each is a `Reduction` (see `_bmap_reduce`) of one output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from batchrules._jax_versions import cast_varying, varying_axes

# --- sum and mean ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """The sum or the mean of one output, in single precision at least until the end, as in JAX."""

    indices: tuple[int, ...]
    mean: bool
    num_state = 1

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        total = self._total(stacked)
        return [lax.full_like(total, 0, dtype=_wider(total.dtype))]

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return [state[0] + jnp.sum(chunk[0].astype(state[0].dtype), axis=0)]

    def join(self, state: Sequence[Any], later: Sequence[Any]) -> list[Any]:
        return [state[0] + later[0]]

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        total = state[0] / size if self.mean else state[0]
        return [total.astype(self._total(stacked).dtype)]

    def _total(self, stacked: Sequence[Any]) -> Any:
        return jax.eval_shape(partial(jnp.mean if self.mean else jnp.sum, axis=0), stacked[0])


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
        if jnp.issubdtype(stacked[0].dtype, jax.dtypes.extended):
            raise TypeError(
                f'bmap: reduce="{self._name}" needs numbers; the function\'s result is {stacked[0].dtype}'
                f"{list(stacked[0].shape[1:])}. Stack it (reduce=None for this output)."
            )
        shape, dtype = stacked[0].shape[1:], _wider(stacked[0].dtype)
        return [
            jnp.full(shape, _worst(dtype, largest=self.largest), dtype),
            jnp.zeros(shape, _count_dtype(dtype)),
        ]

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return self.join(state, self._of_chunk(chunk[0]))

    def join(self, state: Sequence[Any], later: Sequence[Any]) -> list[Any]:
        return list(_better(self.largest, *state, *later))

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        if size == 0:
            raise ValueError(
                f'bmap: reduce="{self._name}" of an axis of size 0 has no value; map over at least one element.'
            )
        return [state[0].astype(stacked[0].dtype)]

    @property
    def _name(self) -> str:
        return "max" if self.largest else "min"

    def _of_chunk(self, chunk: Any) -> tuple[Any, Any]:
        # Computed once, or else XLA may compute it twice, differently, and then nothing equals the best.
        chunk = lax.optimization_barrier(chunk.astype(_wider(chunk.dtype)))
        best = (jnp.max if self.largest else jnp.min)(chunk, axis=0)
        count = jnp.sum(chunk == best[None], axis=0, dtype=_count_dtype(best.dtype))
        return best, lax.stop_gradient(count)


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
def _better(largest: bool, old: Any, old_count: Any, new: Any, new_count: Any) -> tuple[Any, Any]:  # noqa: FBT001
    best = (jnp.maximum if largest else jnp.minimum)(old, new)
    zero = jnp.zeros_like(old_count)
    return best, jnp.where(old == best, old_count, zero) + jnp.where(new == best, new_count, zero)


@_better.defjvp
def _better_jvp(largest: bool, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:  # noqa: FBT001
    old, old_count, _, _ = primals
    best, count = _better(largest, *primals)
    weight = (jnp.where(old == best, old_count, jnp.zeros_like(old_count)) / count).astype(best.dtype)
    weight = lax.stop_gradient(weight)
    # JAX 0.7 gives zeros that do not vary where the others do.
    d_old, d_new = (cast_varying(t, varying_axes(jax.typeof(weight))) for t in (tangents[0], tangents[2]))
    moved = weight * d_old + (1 - weight) * d_new
    return (best, count), (moved, jnp.zeros_like(count))
