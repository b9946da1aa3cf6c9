"""`bmap` beside `jax.vmap`, `jax.lax.map`, NetKet's `vmap_chunked` and folx's `batched_vmap`, where they are installed.

The function is 4 × tanh(W @ a), of width 256, in chunks of 1024. Temporaries are the compiler's own figures. A
gradient is that of the sum of squared results; with "checkpoint", `lax.map` maps `jax.checkpoint` of the function.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from timing import Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchrules._bmap import bmap  # the checkout's, wherever this is run from

Mapped = Callable[..., Any]

WIDTH = 256
BATCH_SIZE = 1024
ROUNDS = 121
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) / 16, jnp.float32)


def rows() -> Iterator[Row]:
    """Each figure of the issue's table beside its target."""
    for size, target in ((16384, 1.0), (16000, 0.85), (16001, 1.0)):
        yield from forward(size, target)
    yield from other_axis(16000)
    yield from gradients(16000, 0.9)
    yield from gradients(16384, 1.0)
    yield reduction(16384, 1024)
    yield many_chunks(20_000)


def layers(a: jax.Array, weights: jax.Array = WEIGHTS) -> jax.Array:
    """The function of one element."""
    for _ in range(4):
        a = jnp.tanh(weights @ a)
    return a


def inputs(size: int, axis: int = 0) -> jax.Array:
    """Elements along an axis."""
    shape = (size, WIDTH) if axis == 0 else (WIDTH, size)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def in_map(function: Mapped) -> Mapped:
    """`lax.map` of a function."""
    return lambda x: jax.lax.map(function, x, batch_size=BATCH_SIZE)


def optional_peers() -> dict[str, Mapped]:
    """The function mapped by the packages that are installed."""
    peers: dict[str, Mapped] = {}
    if importlib.util.find_spec("netket"):
        peers["NetKet"] = importlib.import_module("netket.jax").vmap_chunked(layers, chunk_size=BATCH_SIZE)
    if importlib.util.find_spec("folx"):
        peers["folx"] = importlib.import_module("folx").batched_vmap(layers, max_batch_size=BATCH_SIZE)
    return peers


def of_squares(mapped: Mapped) -> Mapped:
    """The gradient of the sum of squared results."""
    return jax.grad(lambda x: jnp.sum(mapped(x) ** 2))


class Compiled:
    """A program, compiled for its arguments."""

    def __init__(self, function: Mapped, *args: Any) -> None:
        compiled = jax.jit(function).lower(*args).compile()
        analysis: Any = compiled.memory_analysis()
        self.megabytes: float = analysis.temp_size_in_bytes / 1e6
        self.run = partial(compiled, *args)


def times(programs: dict[str, Compiled]) -> dict[str, float]:
    """Median times, measured in turns, once the results were seen to be equal."""
    first, *others = [np.asarray(program.run()) for program in programs.values()]
    for other in others:
        np.testing.assert_allclose(first, other, rtol=1e-3, atol=1e-4)
    return timing.median_seconds({name: program.run for name, program in programs.items()}, rounds=ROUNDS)


def memory_row(what: str, peer: str, ours: float, theirs: float, target: float) -> Row:
    """A row that compares temporaries."""
    return Row(what, peer, f"{ours:.2f} MB", f"{theirs:.2f} MB", ours / theirs, target)


def forward(size: int, target: float) -> Iterator[Row]:
    """Time and temporaries of the function itself, and how long it takes to compile."""
    functions = {"lax.map": in_map(layers), **optional_peers()}
    x, ours = inputs(size), bmap(layers, batch_size=BATCH_SIZE)
    programs = {name: Compiled(f, x) for name, f in {"bmap": ours, "vmap": jax.vmap(layers), **functions}.items()}
    taken = times(programs)
    for peer in functions:
        limit = target if peer == "lax.map" else 1.05
        yield timing.ratio_row(f"bmap, N = {size}", peer, taken["bmap"], taken[peer], limit)
    if size % BATCH_SIZE == 0:
        return
    mine, theirs = programs["bmap"].megabytes, programs["lax.map"].megabytes
    yield Row("  temporaries", "lax.map", f"{mine:.2f} MB", f"{theirs:.2f} MB", mine, 2.8, "MB")
    seconds = compile_seconds({"bmap": ours, "lax.map": functions["lax.map"]}, x)
    yield timing.ratio_row("  tracing and compiling", "lax.map", seconds["bmap"], seconds["lax.map"], 0.8)


def compile_seconds(functions: dict[str, Mapped], x: jax.Array) -> dict[str, float]:
    """Median times to trace and compile, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.freeze()  # what the peers' packages have imported, which the collector would walk through at any moment
    for _ in range(15):
        for name, function in functions.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(function).lower(x).compile()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in taken.items()}


def other_axis(size: int) -> Iterator[Row]:
    """In and out along axis 1."""
    x = inputs(size, axis=1)
    ours, peer = Compiled(bmap(layers, 1, 1, batch_size=BATCH_SIZE), x), Compiled(jax.vmap(layers, 1, 1), x)
    taken = times({"ours": ours, "peer": peer})
    yield timing.ratio_row(f"bmap along axis 1, N = {size}", "vmap", taken["ours"], taken["peer"], 1.15)
    yield memory_row("  temporaries", "vmap", ours.megabytes, peer.megabytes, 1 / 6)


def gradients(size: int, target: float) -> Iterator[Row]:
    """Time and temporaries of the gradient, without and with checkpoint."""
    x = inputs(size)
    ours, peer = (Compiled(of_squares(f), x) for f in (bmap(layers, batch_size=BATCH_SIZE), in_map(layers)))
    taken = times({"ours": ours, "peer": peer})
    yield timing.ratio_row(f"gradient, N = {size}", "lax.map", taken["ours"], taken["peer"], 0.95)
    yield memory_row("  temporaries", "lax.map", ours.megabytes, peer.megabytes, 0.9)
    checkpointed = bmap(layers, batch_size=BATCH_SIZE, checkpoint=True), in_map(jax.checkpoint(layers))
    ours, peer = (Compiled(of_squares(f), x) for f in checkpointed)
    taken = times({"ours": ours, "peer": peer})
    yield timing.ratio_row(f"gradient with checkpoint, N = {size}", "lax.map", taken["ours"], taken["peer"], target)
    yield Row(
        "  temporaries", "lax.map", f"{ours.megabytes:.2f} MB", f"{peer.megabytes:.2f} MB", ours.megabytes, 22.5, "MB"
    )


def reduction(size: int, batch_size: int) -> Row:
    """Temporaries of a sum of gradients, against a program that has only one chunk."""

    def gradient(weights: jax.Array, a: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(layers(a, w) ** 2))(weights)

    one_chunk = lambda w, x: jnp.sum(jax.vmap(gradient, (None, 0))(w, x), axis=0)  # noqa: E731
    ours = Compiled(bmap(gradient, (None, 0), batch_size=batch_size, reduce="sum"), WEIGHTS, inputs(size))
    peer = Compiled(one_chunk, WEIGHTS, inputs(batch_size))
    return memory_row(f'reduce="sum" of a gradient, N = {size}', "one chunk alone", ours.megabytes, peer.megabytes, 1.2)


def many_chunks(count: int) -> Row:
    """What a chunk costs, when it has one element."""
    x = jnp.ones((count, 8), jnp.float32)
    ours = Compiled(bmap(jnp.sin, batch_size=1), x)
    peer = Compiled(lambda x: jax.lax.scan(lambda carry, a: (carry, jnp.sin(a)), None, x)[1], x)
    taken = timing.median_seconds({"ours": ours.run, "peer": peer.run}, rounds=4 * ROUNDS)
    return timing.ratio_row(f"{count} chunks of one element", "lax.scan", taken["ours"], taken["peer"], 1.1)


if __name__ == "__main__":
    timing.show(rows())
