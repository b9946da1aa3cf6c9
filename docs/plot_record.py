"""Draw docs/record.png: twenty calls on four workers.

Run as `python docs/plot_record.py`; it needs matplotlib.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import batchrules

OUTPUT = Path(__file__).with_name("record.png")


@batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"), executor=4)
def simulate(x: Any) -> Any:
    """Take longer for some points than for others."""
    time.sleep(0.01 * (1 + float(x[0])))
    return np.sin(x).sum()


def main() -> None:
    """Record a sweep, and draw it."""
    mpl.use("agg")
    points = jnp.linspace(0, 1, 60, dtype="float32").reshape(20, 3)
    sweep = jax.jit(jax.vmap(simulate))
    jax.block_until_ready(sweep(points))
    with batchrules.record() as log:
        jax.block_until_ready(sweep(points))
    figure: Any = log.plot().figure
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
