"""Compare `batchrules.bmap` with its peers, side by side in one process, and with its targets.

    python benchmarks/bmap.py

The function is four times tanh(W @ a), of width 256, in chunks of 1024. Times are medians of calls that take turns, so that
another program on the machine slows all of them. Temporaries are the compiler's own figures. NetKet and folx are measured
where they are installed.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchrules._bmap import bmap  # noqa: E402  # the checkout's, wherever this is run from

Function = Callable[..., Any]

WIDTH = 256
BATCH_SIZE = 1024
REPEATS = 15
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) / 16, jnp.float32)


def layers(a: jax.Array) -> jax.Array:
    """The function of one element."""
    for _ in range(4):
        a = jnp.tanh(WEIGHTS @ a)
    return a


def loss(mapped: Function) -> Function:
    """A scalar function whose gradient needs all results."""
    return jax.grad(lambda x: jnp.sum(mapped(x) ** 2))


@dataclass
class Measured:
    """One compiled program: what it takes to compile it, its temporaries, and then its times."""

    name: str
    run: Function
    megabytes: float
    compile_ms: float
    milliseconds: float = 0.0


def build(name: str, function: Function, *arguments: Any) -> Measured:
    """Compile a program for these arguments, several times, because the first time is often slow."""
    times = []
    for _ in range(5):
        jax.clear_caches()
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        times.append(1e3 * (time.perf_counter() - start))
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return Measured(name, partial(compiled, *arguments), temporaries, statistics.median(times))


def measure(functions: dict[str, Function], *arguments: Any) -> dict[str, Measured]:
    """Compile all, then let them take turns."""
    programs = {name: build(name, function, *arguments) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(REPEATS):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program.run())
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, program in programs.items():
        program.milliseconds = statistics.median(times[name])
    return programs


def ratio_of_times(ours: Function, peer: Function, *arguments: Any) -> float:
    """The median of the ratios of calls next to each other."""
    jax.block_until_ready((ours(*arguments), peer(*arguments)))
    ratios = []
    for _ in range(REPEATS):
        marks = [time.perf_counter()]
        for function in (ours, peer):
            jax.block_until_ready(function(*arguments))
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return statistics.median(ratios)


def optional_peers() -> dict[str, Function]:
    """The mapped function by NetKet and folx, where they are installed."""
    peers: dict[str, Function] = {}
    for name, module, make in (
        ("NetKet", "netket.jax", lambda m: m.vmap_chunked(layers, chunk_size=BATCH_SIZE)),
        ("folx", "folx", lambda m: m.batched_vmap(layers, max_batch_size=BATCH_SIZE)),
    ):
        try:
            peers[name] = make(importlib.import_module(module))
        except ImportError as error:
            print(f"{name}: not measured ({error})")
    return peers


def in_chunks(**options: Any) -> Function:
    """`bmap` of the function."""
    return bmap(layers, batch_size=BATCH_SIZE, **options)


def in_map(function: Function) -> Function:
    """`jax.lax.map` of the function."""
    return lambda x: jax.lax.map(function, x, batch_size=BATCH_SIZE)


def report(title: str, programs: dict[str, Measured]) -> None:
    """Print what was measured."""
    print(f"\n{title}")
    for name, program in programs.items():
        print(
            f"  {name:18} {program.milliseconds:8.1f} ms {program.megabytes:8.2f} MB of temporaries"
            f" {program.compile_ms:7.0f} ms to trace and compile"
        )


def verdict(what: str, value: float, target: float, unit: str = "x") -> None:
    """Print a figure beside its target."""
    print(f"  -> {what}: {value:.2f} {unit} (target: at most {target} {unit}) {'ok' if value <= target else 'MISSED'}")


def inputs(size: int, axis: int = 0) -> jax.Array:
    """Elements along an axis."""
    shape = (size, WIDTH) if axis == 0 else (WIDTH, size)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def forward(size: int, time_target: float, peers: dict[str, Function]) -> None:
    """Time and temporaries of the function itself."""
    x = inputs(size)
    functions = {"vmap": jax.vmap(layers), "lax.map": in_map(layers), **peers, "bmap": in_chunks()}
    programs = measure(functions, x)
    report(f"forward, N = {size}", programs)
    verdict("time / lax.map", ratio_of_times(programs["bmap"].run, programs["lax.map"].run), time_target)
    if size % BATCH_SIZE:
        verdict("temporaries", programs["bmap"].megabytes, 2.8, "MB")
        verdict("compile time / lax.map", programs["bmap"].compile_ms / programs["lax.map"].compile_ms, 0.8)


def other_axis(size: int) -> None:
    """The same along axis 1."""
    x = inputs(size, axis=1)
    functions = {
        "vmap": jax.vmap(layers, 1, 1),
        "lax.map, transposed": lambda x: in_map(layers)(x.T).T,
        "bmap": bmap(layers, 1, 1, batch_size=BATCH_SIZE),
    }
    programs = measure(functions, x)
    report(f"in_axes=1, out_axes=1, N = {size}", programs)
    verdict("time / vmap", ratio_of_times(programs["bmap"].run, programs["vmap"].run), 1.15)
    verdict("temporaries / vmap", programs["bmap"].megabytes / programs["vmap"].megabytes, round(1 / 6, 3))


def gradient(size: int, time_target: float | None) -> None:
    """Time and temporaries of the gradient, with and without checkpoint."""
    x = inputs(size)
    functions = {
        "vmap": loss(jax.vmap(layers)),
        "lax.map": loss(in_map(layers)),
        "bmap": loss(in_chunks()),
        "lax.map, ck": loss(in_map(jax.checkpoint(layers))),
        "bmap, ck": loss(in_chunks(checkpoint=True)),
    }
    programs = measure(functions, x)
    report(f"gradient, N = {size} (ck: checkpoint)", programs)
    verdict("temporaries / lax.map", programs["bmap"].megabytes / programs["lax.map"].megabytes, 0.9)
    verdict("time / lax.map", ratio_of_times(programs["bmap"].run, programs["lax.map"].run), 0.95)
    if time_target is not None:
        verdict("ck: temporaries", programs["bmap, ck"].megabytes, 22.5, "MB")
        verdict("ck: time", ratio_of_times(programs["bmap, ck"].run, programs["lax.map, ck"].run), time_target)


def reduction(size: int) -> None:
    """The sum of a gradient over all elements, whose temporaries should be one chunk's."""

    def gradient_of_weights(weights: jax.Array, a: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(jnp.tanh(w @ a) ** 2))(weights)

    mapped = bmap(gradient_of_weights, (None, 0), batch_size=32, reduce="sum")
    one_chunk = jax.vmap(gradient_of_weights, (None, 0))
    whole = build("all chunks", mapped, WEIGHTS, inputs(size))
    chunk = build("one chunk", lambda w, x: jnp.sum(one_chunk(w, x), axis=0), WEIGHTS, inputs(32))
    stacked = build("one chunk, stacked", one_chunk, WEIGHTS, inputs(32))
    print(f'\nreduce="sum" of a gradient, N = {size}, chunks of 32')
    print(f"  one chunk: {chunk.megabytes:.2f} MB of temporaries, {stacked.run().nbytes / 1e6:.2f} MB of gradients")
    print(f"  all chunks: {whole.megabytes:.2f} MB of temporaries")
    one = max(chunk.megabytes, stacked.run().nbytes / 1e6)
    verdict("temporaries / one chunk's", whole.megabytes / one, 1.2)


def overhead() -> None:
    """Many chunks of one element, against a scan that does the same."""
    x = jnp.ones((20_000, 8), jnp.float32)
    ours = jax.jit(bmap(jnp.sin, batch_size=1))
    scan = jax.jit(lambda x: jax.lax.scan(lambda carry, a: (carry, jnp.sin(a)), None, x)[1])
    value = ratio_of_times(ours, scan, x)
    start = time.perf_counter()
    jax.block_until_ready(ours(x))
    print(f"\n20,000 chunks of one element: {1e6 * (time.perf_counter() - start) / 20_000:.2f} us a chunk")
    verdict("time / lax.scan", value, 1.1)


def main() -> None:
    """Measure everything."""
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, batches of {BATCH_SIZE}")
    peers = optional_peers()
    for size, target in ((16384, 1.0), (16000, 0.85), (16001, 1.0)):
        forward(size, target, peers)
    other_axis(16000)
    for size, target in ((16000, 0.9), (16384, 1.0), (16001, None)):
        gradient(size, target)
    reduction(16384)
    overhead()


if __name__ == "__main__":
    main()
