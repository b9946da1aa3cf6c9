"""Functions, arguments and comparisons that the tests of bmap share."""

import jax
import jax.numpy as jnp
import numpy as np

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
