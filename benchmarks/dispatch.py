"""The calls of a batch on an executor: against the ideal time, in-order calls and `jax.pure_callback`."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, in_words, median_seconds, ratio_row, show

import batchrules

SHAPE = jax.ShapeDtypeStruct((3,), "float32")
THREADS, WORKERS = 32, 2


def wait_5_ms(x: Any) -> Any:
    time.sleep(5e-3)
    return np.asarray(x) * np.float32(2)


def wait_50_ms(x: Any) -> Any:
    time.sleep(50e-3)
    return np.asarray(x) * np.float32(2)


def spin_10_us(x: Any) -> Any:
    end = time.perf_counter() + 10e-6
    while time.perf_counter() < end:
        pass
    return np.asarray(x) * np.float32(2)


def elements(count: int) -> jax.Array:
    return jnp.arange(count * 3, dtype="float32").reshape(count, 3)


def mapped(function: Callable[..., Any], executor: int | Executor | None) -> Callable[..., Any]:
    return jax.jit(jax.vmap(batchrules.host_call(function, SHAPE, method="sequential", executor=executor)))


def rows() -> Iterator[Row]:
    yield from _long_elements()
    yield _short_elements()
    if importlib.util.find_spec("distributed") is not None:
        yield _dask()


def _long_elements() -> Iterator[Row]:
    xs, ideal = elements(512), 512 / THREADS * 5e-3
    ours = mapped(wait_5_ms, THREADS)
    theirs = jax.jit(jax.vmap(lambda x: jax.pure_callback(wait_5_ms, SHAPE, x, vmap_method="sequential")))
    assert np.array_equal(ours(xs), theirs(xs))
    taken = median_seconds({"ours": lambda: ours(xs)}, rounds=15)["ours"]
    # In turns, but few: each of the peer's takes some seconds.
    both = median_seconds({"ours": lambda: ours(xs), "theirs": lambda: theirs(xs)}, rounds=3)
    what = f"host_call, 512 elements of 5 ms, {THREADS} threads"
    yield ratio_row(what, "ideal: 16 x 5 ms", taken, ideal, 1.15)
    yield ratio_row(what, "pure_callback, sequential", both["ours"], both["theirs"], 1 / 25)


def _short_elements() -> Row:
    xs = elements(10_000)
    ours, in_order = mapped(spin_10_us, THREADS), mapped(spin_10_us, None)
    assert np.array_equal(ours(xs), in_order(xs))
    times = median_seconds({"ours": lambda: ours(xs), "in order": lambda: in_order(xs)}, rounds=15)
    what = f"host_call, 10,000 elements of 10 µs, {THREADS} threads"
    return ratio_row(what, "host_call, in order", times["ours"], times["in order"], 1.5)


def _dask() -> Row:
    import distributed  # noqa: PLC0415  # an extra

    xs, ideal = elements(64), 64 / WORKERS * 50e-3
    with contextlib.ExitStack() as stack:
        options = {"n_workers": WORKERS, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
        cluster = stack.enter_context(distributed.LocalCluster(**options))
        client = stack.enter_context(distributed.Client(cluster))
        ours = mapped(wait_50_ms, client.get_executor())
        assert np.array_equal(ours(xs), np.asarray(xs) * 2)
        taken = median_seconds({"ours": lambda: ours(xs)}, rounds=3)["ours"]
    return Row(
        f"host_call, 64 elements of 50 ms, {WORKERS} Dask workers",
        "ideal: 32 x 50 ms", in_words(taken), in_words(ideal), taken / ideal, 1.3,
    )  # fmt: skip


if __name__ == "__main__":
    show(rows())
