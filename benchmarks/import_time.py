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
middle = time.perf_counter()
import batchrules
print(middle - start, time.perf_counter() - middle)
"""


def rows() -> Iterator[Row]:
    measured = [_import_once() for _ in range(ROUNDS + 1)][1:]  # the first may compile bytecode
    jax_alone, more = (statistics.median(times) for times in zip(*measured, strict=True))
    yield Row(
        "import batchrules, after import jax",
        "import jax",
        in_words(more),
        in_words(jax_alone),
        more * 1e3,
        30,
        "ms",
    )


def _import_once() -> tuple[float, float]:
    command = [sys.executable, "-c", PROGRAM]
    root = Path(__file__).resolve().parent.parent
    # A user's imports find compiled bytecode; where it is never written, this would time the compiler.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # A fresh interpreter, in the repository, so that it finds the same batchrules.
    output = subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True).stdout  # noqa: S603
    jax_alone, more = map(float, output.split())
    return jax_alone, more


if __name__ == "__main__":
    show(rows())
