"""Run every benchmark and print one table. Exits with 1 if a target was missed.

`python benchmarks/run.py` runs all; names choose some: `python benchmarks/run.py host_sequential registered`.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import sys
from pathlib import Path

import jax
import timing

NOT_BENCHMARKS = ("run", "timing")


def main() -> int:
    """Print the table; 1 if a target was missed, else 0."""
    here = Path(__file__).parent
    names = sys.argv[1:] or sorted(path.stem for path in here.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    missed = timing.show(itertools.chain.from_iterable(importlib.import_module(name).rows() for name in names))
    print(f"{missed} targets missed" if missed else "All targets met.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
