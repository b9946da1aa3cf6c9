"""The main job on real foreign code: calls made, time against JAX's own rule, and largest difference.

Run it with `python demo/run.py`. It exits with 1 if a row is at fault.
"""

from __future__ import annotations

import itertools
import sys
import time

import jax

# The kernels are CPU code; the reaction needs float64.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)  # noqa: FBT003 - this is JAX's own signature

import kernel  # noqa: E402
import lapack  # noqa: E402
import robertson  # noqa: E402
import table  # noqa: E402


def main() -> int:
    """Print the table; 1 if a row is at fault, else 0."""
    start = time.perf_counter()
    faulty = table.show(itertools.chain(lapack.lines(), robertson.lines(), kernel.lines()))
    seconds = time.perf_counter() - start
    verdict = f"{faulty} rows at fault" if faulty else "All rows within what is allowed"
    print("\nratio: our time over JAX's. difference: from calls made one by one, unbatched.")
    print(f"{verdict}. jax {jax.__version__}, {seconds:.0f} s.")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
