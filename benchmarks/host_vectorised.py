"""A vectorised `host_call` against `jax.pure_callback` with the same method; one argument mapped, one not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, median_seconds, ratio_row, show

import batchrules

COUNT, SIZE = 1000, 1000
SHAPE = jax.ShapeDtypeStruct((SIZE,), "float32")


def weigh(x: Any, weights: Any) -> Any:
    return np.asarray(x) * np.asarray(weights)


def rows() -> Iterator[Row]:
    for method in ("expand_dims", "broadcast_all", "legacy_vectorized"):
        yield _row(method)


def _row(method: str) -> Row:
    xs = jnp.arange(COUNT * SIZE, dtype="float32").reshape(COUNT, SIZE)
    weights = jnp.arange(SIZE, dtype="float32")
    called = batchrules.host_call(weigh, SHAPE, method=method)
    ours = jax.jit(jax.vmap(called, in_axes=(0, None)))
    peer = jax.vmap(lambda *args: jax.pure_callback(weigh, SHAPE, *args, vmap_method=method), in_axes=(0, None))
    theirs = jax.jit(peer)
    assert np.array_equal(ours(xs, weights), theirs(xs, weights))
    times = median_seconds({"ours": lambda: ours(xs, weights), "theirs": lambda: theirs(xs, weights)}, rounds=151)
    what = f"host_call, {method}, {COUNT} x {SIZE} floats"
    return ratio_row(what, f"pure_callback, {method}", times["ours"], times["theirs"], 1.0)


if __name__ == "__main__":
    show(rows())
