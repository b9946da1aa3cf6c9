"""Ours beside tesseract-jax's, side by side in one process, as ratios (ours over theirs; less is better).

    python benchmarks/run.py [WORD ...]       # all cases, or those with one of the words in their names
    python benchmarks/run.py --json           # a line of JSON for each, which the core's `make bench` reads

Needs Python 3.12 and the packages `tesseract-jax`, `tesseract-core[runtime]`. Both are timed in turn, and the figure is
that of their fastest rounds: what else the machine does can only slow a round down.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tesseract_jax
from batchrules_tesseract import TesseractClient, apply_tesseract
from tesseract_core import Tesseract
from tesseracts.serving import load, serve

jax.config.update("jax_enable_x64", True)  # noqa: FBT003  # the interface of JAX

SLOW = 0.020


@dataclass(frozen=True)
class Case:
    """Two programs that do the same.

    Attributes:
        name: What they do.
        target: The ratio to reach.
        ours: With batchrules-tesseract.
        theirs: With tesseract-jax.
        repeats: How often each runs in a round.
        rounds: How many rounds.
    """

    name: str
    target: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    repeats: int = 1
    rounds: int = 20


def main() -> None:
    wanted = [word for word in sys.argv[1:] if word != "--json"]
    as_json = "--json" in sys.argv
    if not as_json:
        print(f"{'':58} {'ours':>10} {'theirs':>10} {'ratio':>7} {'target':>7}")
    for case in cases():
        if not wanted or any(word in case.name for word in wanted):
            report(case, as_json=as_json)


def report(case: Case, *, as_json: bool) -> None:
    """Run both once, compare their results, and time them in turn."""
    for ours, theirs in zip(jax.tree.leaves(case.ours()), jax.tree.leaves(case.theirs()), strict=True):
        assert jnp.allclose(ours, theirs), case.name
    pairs = [(timed(case.ours, case.repeats), timed(case.theirs, case.repeats)) for _ in range(case.rounds)]
    ours, theirs = (min(column) * 1e3 for column in zip(*pairs, strict=True))
    if as_json:
        print(json.dumps({"what": case.name, "ours": ours, "theirs": theirs, "target": case.target}), flush=True)
    else:
        print(f"{case.name:58} {ours:8.2f}ms {theirs:8.2f}ms {ours / theirs:7.3f} {case.target:7.3f}", flush=True)


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Seconds for one run."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / repeats


def cases() -> Iterator[Case]:
    """The figures of the issue's table."""
    yield in_process()
    with serve("solver") as served:
        yield from bodies(served.url, "float64")
        yield from small(served.url)
        yield jacobian(served.url)
    with serve("solver", settings={"DTYPE": "float32"}) as served:
        yield from bodies(served.url, "float32")
    with serve("solver", workers=8) as served:
        yield many_slow_elements(served.url)


def both(url: str, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The solver as a function of x, ours by URL and theirs by their object."""
    client = TesseractClient(url)
    tesseract = Tesseract.from_url(url)

    def ours(x: Any, delay: float = 0.0, **more: Any) -> Any:
        return apply_tesseract(client, {"x": x, "delay": delay}, **options, **more)["y"]

    def theirs(x: Any, delay: float = 0.0) -> Any:
        return tesseract_jax.apply_tesseract(tesseract, {"x": x, "delay": delay}, **options)["y"]

    return ours, theirs


def many_slow_elements(url: str) -> Case:
    """64 elements of a 20 ms solver, from 32 threads."""
    ours, theirs = both(url, vmap_method="sequential")
    xs = jnp.arange(64.0 * 3).reshape(64, 3)
    fast = jax.jit(jax.vmap(lambda x: ours(x, SLOW, executor=32)))
    slow = jax.jit(jax.vmap(lambda x: theirs(x, SLOW)))
    name = "64 elements of a 20 ms solver, 8 workers, executor=32"
    return Case(name, 1 / 7, lambda: fast(xs), lambda: slow(xs), rounds=5)


def jacobian(url: str) -> Case:
    """A Jacobian without the endpoint."""
    ours, _ = both(url, vmap_method="auto")
    _, theirs = both(url, vmap_method="auto_experimental")
    x = jnp.arange(50.0)
    fast, slow = jax.jit(jax.jacrev(lambda x: ours(x, SLOW))), jax.jit(jax.jacrev(lambda x: theirs(x, SLOW)))
    return Case("jacrev (50,) -> (50,) of a 20 ms solver", 1 / 25, lambda: fast(x), lambda: slow(x), rounds=5)


def bodies(url: str, dtype: str) -> Iterator[Case]:
    """Large arrays there and back."""
    ours, theirs = both(url)
    fast, slow = jax.jit(ours), jax.jit(theirs)
    for megabytes, rounds in ((1, 40), (10, 6)):
        x = jax.random.normal(jax.random.key(0), (megabytes * 2**20 // jnp.dtype(dtype).itemsize,), dtype)
        yield Case(
            f"{megabytes} MB of {dtype} each way", 1 / 6, lambda x=x: fast(x), lambda x=x: slow(x), rounds=rounds
        )


def small(url: str) -> Iterator[Case]:
    """Small arrays, once and often."""
    ours, theirs = both(url, vmap_method="sequential")
    x, xs = jnp.ones(3), jnp.ones((1000, 3))
    fast, slow = jax.jit(ours), jax.jit(theirs)
    yield Case("one tiny jitted apply", 0.8, lambda: fast(x), lambda: slow(x), repeats=20, rounds=40)
    many, many_theirs = jax.jit(jax.vmap(ours)), jax.jit(jax.vmap(theirs))
    yield Case("1000 vmapped elements, sequential", 0.7, lambda: many(xs), lambda: many_theirs(xs), rounds=5)


def in_process() -> Case:
    """A Tesseract in this process."""
    tesseract = Tesseract.from_tesseract_api(load("solver"))
    fast = jax.jit(lambda x: apply_tesseract(tesseract, {"x": x})["y"])
    slow = jax.jit(lambda x: tesseract_jax.apply_tesseract(tesseract, {"x": x})["y"])
    x = jnp.ones(3)
    return Case("one tiny jitted apply in process", 0.8, lambda: fast(x), lambda: slow(x), repeats=20, rounds=40)


if __name__ == "__main__":
    main()
