"""Times in turns, differences, and calls counted in a compiled program."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$", re.MULTILINE)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:body|calls|to_apply|condition)=%?([\w.\-]+)")


def times_in_turns(ours: Callable[[], Any], jax_own: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The median milliseconds of each, measured in turns so that a busy machine slows both alike."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, taken in zip((ours, jax_own), samples, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples[0]), statistics.median(samples[1])


def largest_difference(got: Any, reference: Any) -> float:
    """The largest absolute difference between two pytrees of arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def custom_calls(compiled: jax.stages.Compiled, target: str) -> int:
    """How often a compiled program calls a kernel: its custom calls, times the trips of the loops around."""
    text = compiled.as_text() or ""
    starts = list(_COMPUTATION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    bodies = {start[1]: text[start.end() : end] for start, end in zip(starts, ends, strict=True)}
    entry = next(start[1] for start in starts if start[0].startswith("ENTRY"))
    return _calls_within(entry, bodies, target)


def _calls_within(computation: str, bodies: dict[str, str], target: str) -> int:
    text = bodies[computation]
    nested = sum(trips * _calls_within(name, bodies, target) for name, trips in _called(text, bodies, target))
    return text.count(f'custom_call_target="{target}"') + nested


def _called(text: str, bodies: dict[str, str], target: str) -> Iterator[tuple[str, int]]:
    """The computations that this one uses, each with how often it runs."""
    for line in text.splitlines():
        trips = _TRIPS.search(line)
        for name in _CALLED.findall(line):
            if " while(" in line and trips is None and _calls_within(name, bodies, target):
                raise ValueError(f"A loop around {target} has no known trip count, so its calls cannot be counted.")
            yield name, int(trips[1]) if trips else 1
