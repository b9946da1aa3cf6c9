"""The functions of our own tests, checked with the kit that users get.

An adapter's tests do the same with what it makes, such as `check_batching(apply, *inputs, in_axes=..., endpoints=...)`
where `apply` calls a Tesseract; `methods=` is for a `host_call` alone.
"""

import jax
import numpy as np
import pytest
from foreign import FOREIGN, made, whole_numbers
from host_derivatives import ROOTS, WAVES
from host_endpoints import GIVEN, Endpoints

from batchrules.testing import check_batching

METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.name)
def test_foreign_functions(foreign):
    args = [whole_numbers(shape, i) for i, shape in enumerate(foreign.shapes)]
    with made("host", foreign, "sequential", verify=True) as host:
        report = check_batching(host.call, *args, methods=METHODS)
    assert report.counts["nested vmap"] > 0


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(
    ("smooth", "method"), [(WAVES, "expand_dims"), (ROOTS, "sequential"), (ROOTS, "broadcast_all")]
)
def test_derivatives(smooth, given, method):
    function = Endpoints(smooth, method).host_call(given)
    args = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(smooth.foreign.shapes)]
    report = check_batching(function, *args, in_axes=_few(smooth), endpoints=("jvp", "vjp"))
    assert report.left_out == []


def _few(smooth):
    """The first argument alone, all but the first, and all."""
    count = len(smooth.foreign.shapes)
    return [(0, *[None] * (count - 1)), (None, *[0] * (count - 1)), (0,) * count]


@pytest.mark.parametrize("entry", ["device", "register"])
def test_other_entry_points(entry):
    foreign = FOREIGN[0]
    args = [whole_numbers(shape, i) for i, shape in enumerate(foreign.shapes)]
    with made(entry, foreign, "expand_dims") as function:
        check_batching(function.call, *args, in_axes=[(0, None), (0, 0)], endpoints=())


def test_twins():
    """JAX itself."""
    args = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(ROOTS.foreign.shapes)]
    check_batching(jax.jit(ROOTS.twin), *args, in_axes=(0, None))
