"""What `import batchrules` costs a program that has imported jax."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from timing import Row, in_words, show

ROUNDS = 7
PROGRAM = """
import time
start = time.perf_counter()
import jax
jax_there = time.perf_counter()
import batchrules
imported = time.perf_counter()
batchrules.host_call
found = time.perf_counter()
print(jax_there - start, imported - jax_there, found - jax_there)
"""


def rows() -> Iterator[Row]:
    measured = [_import_once() for _ in range(ROUNDS + 1)][1:]  # the first may compile bytecode
    jax_alone, imported, found = (statistics.median(times) for times in zip(*measured, strict=True))
    yield _row("import batchrules, after import jax", imported, jax_alone)
    # A module that loads its parts when they are asked for would make the row above say little.
    yield _row("the same, and batchrules.host_call", found, jax_alone)


def _row(what: str, seconds: float, jax_alone: float) -> Row:
    return Row(what, "import jax", in_words(seconds), in_words(jax_alone), seconds * 1e3, 30, "ms")


def _import_once() -> list[float]:
    command = [sys.executable, "-c", PROGRAM]
    root = Path(__file__).resolve().parent.parent
    # A user's imports find compiled bytecode; where it is never written, this would time the compiler.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # A fresh interpreter, in the repository, so that it finds the same batchrules.
    output = subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return [float(seconds) for seconds in output.split()]


if __name__ == "__main__":
    show(rows())
