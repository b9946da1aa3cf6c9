"""Draw docs/bmap.png: time and temporaries of `bmap` against the batch size.

Run as `python docs/plot_bmap.py`; it needs matplotlib. The function and its measurement are those of
`benchmarks/bmap.py`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import jax

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "benchmarks"))
benchmark: Any = importlib.import_module("bmap")
timing: Any = importlib.import_module("timing")

SIZE = 16_000
BATCH_SIZES = (1, 4, 16, 64, 250, 1000, 4000, 16_000)
Curves = dict[str, tuple[list[float], list[float]]]


def measure() -> Curves:
    """For each kind of program: milliseconds and megabytes of temporaries, for each batch size."""
    return {
        "values": measure_one(derive=False, checkpoint=False),
        "gradient": measure_one(derive=True, checkpoint=False),
        "gradient, checkpoint=True": measure_one(derive=True, checkpoint=True),
    }


def measure_one(*, derive: bool, checkpoint: bool) -> tuple[list[float], list[float]]:
    """One kind of program."""
    x = benchmark.inputs(SIZE)
    mapped = [benchmark.bmap(benchmark.layers, batch_size=b, checkpoint=checkpoint) for b in BATCH_SIZES]
    programs = [benchmark.Compiled(benchmark.of_squares(f) if derive else f, x) for f in mapped]
    taken = timing.median_seconds({str(i): program.run for i, program in enumerate(programs)}, rounds=5)
    return [1e3 * seconds for seconds in taken.values()], [program.megabytes for program in programs]


def draw(found: Curves) -> None:
    """Draw the two panels."""
    import matplotlib as mpl  # noqa: PLC0415  # only whoever draws needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (times, memory) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, (milliseconds, megabytes) in found.items():
        times.plot(BATCH_SIZES, milliseconds, marker="o", label=name)
        memory.plot(BATCH_SIZES, megabytes, marker="o", label=name)
    for panel, label in ((times, "time (ms)"), (memory, "temporaries (MB)")):
        panel.set(xscale="log", yscale="log", xlabel="batch_size", ylabel=label)
        panel.grid(alpha=0.3)
    memory.legend()
    figure.suptitle(f"{SIZE} elements; the last point is plain jax.vmap (jax {jax.__version__}, CPU)")
    figure.savefig(DOCS / "bmap.png", dpi=110)


if __name__ == "__main__":
    draw(measure())
