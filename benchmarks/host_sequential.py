"""A vmapped sequential `host_call`, per element, against `jax.pure_callback` and a bare Python loop."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from host_small_call import SHAPE, double, double_for_jax
from timing import Row, median_seconds, ratio_row, show

import batchrules

COUNT = 4000


def bare_loop(rows: np.ndarray) -> np.ndarray:
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        out[i] = double(row)
    return out


def rows() -> Iterator[Row]:
    xs = jnp.arange(COUNT * 3, dtype="float32").reshape(COUNT, 3)
    numpy_rows = np.asarray(xs)
    ours = jax.jit(jax.vmap(batchrules.host_call(double, SHAPE, method="sequential")))
    theirs = jax.jit(jax.vmap(lambda x: jax.pure_callback(double_for_jax, SHAPE, x, vmap_method="sequential")))
    assert np.array_equal(ours(xs), theirs(xs))
    assert np.array_equal(ours(xs), bare_loop(numpy_rows))
    slow = median_seconds({"ours": lambda: ours(xs), "theirs": lambda: theirs(xs)}, rounds=9)
    fast = median_seconds({"ours": lambda: ours(xs), "loop": lambda: bare_loop(numpy_rows)}, rounds=101)
    what = f"host_call, sequential, N = {COUNT}, per element"
    yield ratio_row(what, "pure_callback, sequential", slow["ours"] / COUNT, slow["theirs"] / COUNT, 1 / 20)
    yield ratio_row(what, "a bare Python loop", fast["ours"] / COUNT, fast["loop"] / COUNT, 1.5)


if __name__ == "__main__":
    show(rows())
