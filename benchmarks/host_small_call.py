"""One small call in a jitted program: `host_call` against `jax.pure_callback`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, median_seconds, ratio_row, show

import batchrules

SHAPE = jax.ShapeDtypeStruct((3,), "float32")


def double(x: Any) -> Any:
    return x * np.float32(2)


def double_for_jax(x: Any) -> Any:
    # pure_callback hands over a jax.Array, on which arithmetic would be a JAX program inside the callback.
    return np.asarray(x) * np.float32(2)


def rows() -> Iterator[Row]:
    x = jnp.arange(3, dtype="float32")
    ours = jax.jit(batchrules.host_call(double, SHAPE))
    theirs = jax.jit(lambda x: jax.pure_callback(double_for_jax, SHAPE, x, vmap_method="sequential"))
    assert np.array_equal(ours(x), theirs(x))
    times = median_seconds({"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, rounds=201, repeats=10)
    yield ratio_row("host_call, one small call, jitted", "pure_callback", times["ours"], times["theirs"], 0.2)


if __name__ == "__main__":
    show(rows())
