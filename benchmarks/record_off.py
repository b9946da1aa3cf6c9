"""What `record()` costs where nobody records: a small call against the same call without the one truth test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, median_seconds, ratio_row, show

import batchrules
from batchrules import _host_runners
from batchrules._host_runner import Runner

SHAPE = jax.ShapeDtypeStruct((3,), "float32")


def double(x: Any) -> Any:
    return x * np.float32(2)


class Deaf(Runner):
    """A runner that does not ask whether anyone listens."""

    def __call__(self, *arrays: Any) -> Any:
        if self._bare is not None:
            return self._bare(*arrays)
        return super().__call__(*arrays)


def compiled(runner: type[Runner], x: Any) -> Callable[..., Any]:
    """The call in a jitted program, on its fastest path."""
    before, _host_runners.Runner = _host_runners.Runner, runner
    try:
        program = jax.jit(batchrules.host_call(double, SHAPE))
        program(x).block_until_ready()
    finally:
        _host_runners.Runner = before
    return program


def rows() -> Iterator[Row]:
    x = jnp.arange(3, dtype="float32")
    asks, deaf = compiled(Runner, x), compiled(Deaf, x)
    with batchrules.record() as log:
        asks(x).block_until_ready()
        deaf(x).block_until_ready()
    assert len(log.calls) == 1, "one of the two is not what it should be"
    times = median_seconds({"asks": lambda: asks(x), "deaf": lambda: deaf(x)}, rounds=2001, repeats=20)
    yield ratio_row("one small call, no record active", "the same without the test", times["asks"], times["deaf"], 1.01)


if __name__ == "__main__":
    show(rows())
