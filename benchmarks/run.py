"""Run every benchmark and print one table. Exits with 1 if a target was missed.

`python benchmarks/run.py` runs all; names choose some: `python benchmarks/run.py host_sequential registered`. With
`--write` what was measured goes into docs/benchmarks.md too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from pathlib import Path

import jax
import page
import timing

NOT_BENCHMARKS = ("page", "run", "timing")


def main() -> int:
    """Print the table; 1 if a target was missed, else 0."""
    options = arguments()
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    timing.head()
    missed = 0
    for name in options.names:
        rows = timing.show(importlib.import_module(name).rows())
        missed += sum(row.missed for row in rows)
        if options.write:
            page.keep(name, rows)
    if options.write:
        page.write()
    print(f"{missed} targets missed" if missed else "All targets met.")
    return 1 if missed else 0


def arguments() -> argparse.Namespace:
    """What is to be done."""
    here = Path(__file__).parent
    known = sorted(path.stem for path in here.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    parser = argparse.ArgumentParser(description="Run benchmarks and print one table.")
    parser.add_argument("names", nargs="*", default=known, help="which; all if none is named", metavar="NAME")
    parser.add_argument("--write", action="store_true", help="keep the figures and write docs/benchmarks.md")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
