"""Functions, arguments and comparisons that the tests of bmap share."""

import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchrules._bmap import bmap

WIDTH = 4


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_close(ours, twin):
    assert jax.tree.structure(ours) == jax.tree.structure(twin)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(twin), strict=True):
        assert jnp.shape(a) == jnp.shape(b)
        assert jax.typeof(a).dtype == jax.typeof(b).dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
            continue
        np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))


def network(weights, a, shift):
    """Results that depend on all arguments, on some, and on the unmapped one alone."""
    hidden = jnp.tanh(weights @ a) * shift
    return {"hidden": hidden, "norm": jnp.sum(a**2), "weights": jnp.sum(weights)}


NETWORK_AXES = (None, 1, 0)
NETWORK_OUT_AXES = {"hidden": 1, "norm": 0, "weights": None}


def network_arguments(size):
    return random((WIDTH, WIDTH)), random((WIDTH, size), 1), random(size, 2)


def sum_of_sines(function):
    """A scalar function of everything that the function returns."""
    return lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(*args)))


# --- tables of cases on tables of axes --------------------------------------------------------------------------------

EXHAUSTIVE = "ALL_BMAP_CASES" in os.environ


@dataclass(frozen=True)
class Mapping:
    """An axis, and how bmap divides and reduces it."""

    size: int
    batch_size: int
    reduce: str | None = None
    checkpoint: bool = False

    def ours(self, f, in_axes=0, out_axes=0, **options):
        divided = {"batch_size": self.batch_size, "checkpoint": self.checkpoint, "reduce": self.reduce}
        return bmap(f, in_axes, out_axes, **divided, **options)

    def twin(self, f, in_axes=0, out_axes=0, **options):
        if self.reduce is None:
            return jax.vmap(f, in_axes, out_axes, **options)
        stacked, reduced = jax.vmap(f, in_axes, **options), functools.partial(getattr(jnp, self.reduce), axis=0)
        return lambda *args: jax.tree.map(reduced, stacked(*args))


TAIL, EQUAL = {"tail": Mapping(7, 3)}, {"equal": Mapping(8, 3)}
SUM, MEAN, MAX = {"sum": Mapping(7, 3, "sum")}, {"mean": Mapping(8, 4, "mean")}, {"max": Mapping(7, 3, "max")}
STACKED, ANY = TAIL | EQUAL, TAIL | SUM | EQUAL | MEAN


def each(table, mappings=ANY):
    """Each case on the next of the axes, with and without checkpoint in turn.

    With the environment variable ALL_BMAP_CASES it is each case on all axes in both ways, which takes many minutes.
    """
    axes, cases = list(mappings), []
    for number, (name, case) in enumerate(table.items()):
        turn = axes[number // 2 % len(axes)], number % 2 == 1
        for axis, flag in itertools.product(axes, (False, True)) if EXHAUSTIVE else [turn]:
            label = f"{name}-{axis}{'-checkpoint' * flag}"
            cases.append(pytest.param(case, with_flag(mappings[axis], flag), id=label))
    return pytest.mark.parametrize(("case", "mapping"), cases)


def on(mappings):
    """All of these axes, without and with checkpoint."""
    chosen = {
        f"{axis}{'-checkpoint' * flag}": with_flag(mappings[axis], flag) for axis in mappings for flag in (False, True)
    }
    return pytest.mark.parametrize("mapping", chosen.values(), ids=chosen)


def with_flag(mapping, checkpoint):
    return dataclasses.replace(mapping, checkpoint=checkpoint)


# Compiling is what takes the time here.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def check(mapping, program, args):
    """Compare a function of the arguments, that a program makes of bmap and of jax.vmap."""
    assert_close(quick(program(mapping.ours))(*args), quick(program(mapping.twin))(*args))


def table():
    """A table of functions, and the decorator that adds one."""
    cases = {}

    def case(function):
        cases[function.__name__] = function
        return function

    return cases, case


def cosines(tree):
    return jax.tree.map(jnp.cos, tree)


def tuple_of(*functions):
    """A function with the results of all of them."""
    return lambda *args: tuple(f(*args) for f in functions)
