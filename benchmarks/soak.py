"""Many calls from many threads, of which some fail at random: nothing may be wrong, nameless, or left behind.

    python benchmarks/soak.py                               # 100,000 calls from 8 threads
    python benchmarks/soak.py --calls 2000 --threads 4      # a short one

A call is one program: eager, jitted or vmapped, in order or by an executor, with a derivative or not. Each is given
numbers of its own, so that a result or a failure that belongs to another thread shows. It exits with 1 if a result was
wrong, a failure was missing or misnamed, or memory or threads were left.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import math
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row

import batchrules

VECTOR = np.ones(3, "float32")
NUMBER = jax.ShapeDtypeStruct((), "float32")
# An element whose number is a multiple of this fails. Each program gets a block of numbers in a row.
UNLUCKY = 10
BLOCK = 5
LARGEST = 2**20  # whole numbers that float32 holds, with room to multiply
KINDS = ("call", "jit", "vmap", "jit vmap", "threads", "pool", "vectorised", "nan", "grad", "where", "nested")
PARTS = 8
# Allocators and JAX's caches settle within so many parts.
WARM = 2


class InjectedError(Exception):
    """What the foreign function fails with; it names the number that it failed at."""


def triple(x: Any, y: Any) -> Any:
    """Three times x, or a failure."""
    bad = np.asarray(x)[np.asarray(x) % UNLUCKY == 0]
    if bad.size:
        raise InjectedError(f"number {int(bad.flat[0])}.")
    return x * y.sum(-1)


def pulled(args: Any, cotangent: Any, needed: Any) -> Any:
    """The `vjp` of `triple`, which fails where that does."""
    x, y = args
    triple(x, y)
    to_y = (cotangent * x)[..., None] * VECTOR if needed[1] else None
    return cotangent * y.sum(-1), to_y


@dataclass
class Tally:
    """What one thread has seen."""

    calls: int = 0
    failures: int = 0
    wrong: list[str] = field(default_factory=list)


class Programs:
    """The programs that are run, each a function of numbers and their unmapped vector."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        def make(**options: Any) -> Any:
            return batchrules.host_call(triple, NUMBER, name="triple", vjp=pulled, verify=False, **options)

        plain = make()

        def outside(x: Any, y: Any) -> Any:
            return plain(x, y)

        outer = batchrules.host_call(outside, NUMBER, name="outer")
        self.by_kind: dict[str, Callable[..., Any]] = {
            "call": lambda x, y: plain(x[0], y)[None],
            "jit": jax.jit(lambda x, y: plain(x[0], y)[None]),
            "vmap": mapped(plain),
            "jit vmap": jax.jit(mapped(plain)),
            "threads": jax.jit(mapped(make(executor=2))),
            "pool": jax.jit(mapped(make(executor=pool))),
            "vectorised": jax.jit(mapped(make(method="expand_dims", batch_size=2))),
            "nan": jax.jit(mapped(make(on_error="nan"))),
            "grad": jax.jit(jax.grad(lambda x, y: (mapped(plain)(x, y) ** 2).sum() / 2)),
            "where": jax.jit(mapped(lambda x, y: plain.where(x % UNLUCKY != 0, x, y, otherwise=-1.0))),
            "nested": jax.jit(mapped(outer)),
        }


def mapped(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call over numbers, with one vector for all."""
    return jax.vmap(call, (0, None))


def expected(kind: str, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a program of that kind gives, if it gives anything."""
    given = numbers[:1] if kind in {"call", "jit"} else numbers
    unlucky = given % UNLUCKY == 0
    if kind == "grad":
        return 9 * given
    return np.where(unlucky, {"nan": np.nan, "where": -1}.get(kind, 0), 3 * given).astype("float32")


def fails(kind: str, numbers: np.ndarray[Any, Any]) -> bool:
    """Whether a program of that kind fails."""
    given = numbers[:1] if kind in {"call", "jit"} else numbers
    return kind not in {"nan", "where"} and bool((given % UNLUCKY == 0).any())


class Soak:
    """The run."""

    def __init__(self, calls: int, threads: int) -> None:
        self.calls = calls
        self.threads = threads
        self.tallies = [Tally() for _ in range(threads)]

    def run(self) -> Iterator[tuple[int, float, int]]:
        """Run it, and give after each part: the calls so far, the memory in MB, the threads."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            programs = Programs(pool)
            for part in range(PARTS):
                self._part(programs, part, math.ceil(self.calls / PARTS / self.threads))
                gc.collect()
                yield sum(tally.calls for tally in self.tallies), resident(), threading.active_count()

    def _part(self, programs: Programs, part: int, calls: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(self.threads) as workers:
            done = [workers.submit(self._work, programs, number, part, calls) for number in range(self.threads)]
            for future in done:
                future.result()

    def _work(self, programs: Programs, thread: int, part: int, calls: int) -> None:
        draw = random.Random(1000 * part + thread)  # noqa: S311  # not for secrets
        for _ in range(calls):
            numbers = draw.randrange(LARGEST) + np.arange(BLOCK)
            self._one(programs, self.tallies[thread], draw.choice(KINDS), numbers.astype("float32"))

    def _one(self, programs: Programs, tally: Tally, kind: str, numbers: np.ndarray[Any, Any]) -> None:
        tally.calls += 1
        try:
            with batchrules.original_errors():
                result = np.asarray(programs.by_kind[kind](jnp.asarray(numbers), VECTOR))
        except InjectedError as error:
            tally.failures += 1
            self._check_failure(tally, kind, numbers, error)
            return
        except RuntimeError as error:
            # JAX's own, which `original_errors` did not find the original of; or the library's.
            tally.wrong.append(f"{kind} of {numbers}: {type(error).__name__}: {str(error)[-300:]}")
            return
        if fails(kind, numbers):
            tally.wrong.append(f"{kind} of {numbers}: no failure")
        elif not np.array_equal(result, expected(kind, numbers), equal_nan=True):
            tally.wrong.append(f"{kind} of {numbers}: {result}")

    @staticmethod
    def _check_failure(tally: Tally, kind: str, numbers: np.ndarray[Any, Any], error: InjectedError) -> None:
        own = {f"number {int(number)}." for number in numbers if number % UNLUCKY == 0}
        named = any("triple" in note or "outer" in note for note in getattr(error, "__notes__", ()))
        if str(error) not in own or not fails(kind, numbers) or not named:
            tally.wrong.append(f"{kind} of {numbers}: {error!r}, notes {getattr(error, '__notes__', None)}")


def resident() -> float:
    """The memory that the process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass
class Report:
    """What a run has found."""

    calls: int
    failures: int
    wrong: list[str]
    seconds: float
    growth: float
    threads: int

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong or left."""
        return not self.wrong and self.threads == 0 and self.growth < growth_allowed(self.calls)


def growth_allowed(calls: int) -> float:
    """How many MB the memory may grow after the warm-up: what an allocator's noise is, and 100 bytes a call."""
    return 4 + calls * 100e-6


def soak(calls: int, threads: int) -> Report:
    """Run it, and print how it goes."""
    started, before = time.perf_counter(), threading.active_count()
    run, memory, left = Soak(calls, threads), [], 0
    for done, megabytes, active in run.run():
        print(
            f"{done:>8} calls {megabytes:>8.1f} MB {active:>3} threads {time.perf_counter() - started:>6.1f} s",
            flush=True,
        )
        memory.append(megabytes)
    left = threading.active_count() - before
    warm = memory[WARM - 1]
    tallies = run.tallies
    return Report(
        sum(tally.calls for tally in tallies), sum(tally.failures for tally in tallies),
        [text for tally in tallies for text in tally.wrong], time.perf_counter() - started, memory[-1] - warm, left,
    )  # fmt: skip


def quietly(calls: int, threads: int) -> Report:
    """Run it without the warnings of the elements that are NaN on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", batchrules.FailedElementsWarning)
        return soak(calls, threads)


def rows() -> Iterator[Row]:
    """What `run.py` prints: a short run."""
    report = quietly(8000, 8)
    took = f"{report.seconds:.1f} s"
    yield Row(
        "soak: wrong or nameless", f"{report.calls} calls, {report.failures} failures", took, "", len(report.wrong), 0
    )
    yield Row("soak: threads left", "none", took, "", report.threads, 0)
    yield Row("soak: memory grown", "none", took, "", report.growth, growth_allowed(report.calls), "MB")


def main() -> int:
    """Run it; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    report = quietly(options.calls, options.threads)
    for text in report.wrong[:10]:
        print("WRONG:", text)
    print(
        f"{report.calls} calls from {options.threads} threads in {report.seconds:.1f} s: {report.failures} failures "
        f"injected and named, {len(report.wrong)} wrong, {report.threads} threads left, memory grown by "
        f"{report.growth:.1f} MB after the first quarter."
    )
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
