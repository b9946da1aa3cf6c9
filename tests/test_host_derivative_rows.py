"""Sequential derivatives make no call for rows of zeros when told so, and sum as they go."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import SS, XS, S, X, Y, assert_close
from foreign import Foreign
from host_derivatives import WAVES
from host_endpoints import GIVEN, METHODS, Endpoints, only, with_endpoints

import batchrules

ELEMENTS, OUTPUTS, INPUTS = 35, 4, 3
MATRIX = np.arange(12.0).reshape(OUTPUTS, INPUTS)
MANY = jnp.asarray(np.random.default_rng(3).normal(size=(ELEMENTS, INPUTS)))


def squares(counts, **options):
    """MATRIX @ x²: four outputs of three inputs."""

    def jvp(args, tangents):
        counts.append("jvp")
        return MATRIX @ (2 * args[0] * tangents[0])

    def vjp(args, cotangent, needed):
        del needed
        counts.append("vjp")
        return (cotangent @ MATRIX * 2 * args[0],)

    shape = jax.ShapeDtypeStruct((OUTPUTS,), "float64")
    return batchrules.host_call(lambda x: MATRIX @ x**2, shape, method="sequential", jvp=jvp, vjp=vjp, **options)


ROWS = {
    ("vjp", True): ELEMENTS * OUTPUTS,
    ("vjp", False): ELEMENTS * OUTPUTS * ELEMENTS,
    ("jvp", True): ELEMENTS * INPUTS,
}


@pytest.mark.parametrize(("endpoint", "skip_zero"), ROWS)
def test_rows_of_zeros_make_no_call_when_skipped(endpoint, skip_zero):
    counts = []
    f = squares(counts, skip_zero=skip_zero)
    transform = jax.jacrev if endpoint == "vjp" else jax.jacfwd
    jacobian = jax.jit(transform(jax.vmap(f)))(MANY)
    wanted = transform(lambda xs: (xs**2) @ jnp.asarray(MATRIX.T))(MANY)
    assert_close(jacobian, wanted)
    assert counts == [endpoint] * ROWS[endpoint, skip_zero]


@pytest.mark.parametrize("endpoint", ["vjp", "jvp"])
@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_single_zero_makes_no_call_when_skipped(endpoint, way):
    counts = []
    f = squares(counts, skip_zero=True)
    x = jnp.arange(1.0, 1 + INPUTS)
    if endpoint == "vjp":
        derivative = way(lambda x, ct: jax.vjp(f, x)[1](ct)[0])
        zero, one, wanted = jnp.zeros(OUTPUTS), jnp.ones(OUTPUTS), MATRIX.sum(0) * 2 * x
    else:
        derivative = way(lambda x, t: jax.jvp(f, (x,), (t,))[1])
        zero, one, wanted = jnp.zeros(INPUTS), jnp.ones(INPUTS), MATRIX @ (2 * x)
    for _ in range(2):
        assert_close(derivative(x, zero), jnp.zeros_like(wanted))
    assert counts == []
    assert_close(derivative(x, one), wanted)
    assert counts == [endpoint]


def test_a_row_that_is_zero_in_one_output_only_is_not_skipped():
    endpoints = Endpoints(WAVES, "sequential")
    f = endpoints.host_call(GIVEN["jvp, vjp"], verify=False, skip_zero=True)

    def rows(f):
        pull = jax.vjp(f, X, Y, S)[1]
        return jax.vmap(pull)({"all": XS * 0, "y": XS * jnp.array([[1.0], [0], [1], [0]]), "x": SS * 0})

    assert_close(jax.jit(lambda: rows(f))(), rows(WAVES.twin))
    assert endpoints.counts == {"vjp": 2}


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_batch_with_skip_zero(shape):
    counts = []

    def vjp(args, cotangent, needed):
        del args, needed
        counts.append("vjp")
        return (2 * cotangent,)

    f = batchrules.host_call(lambda x: 2 * x, lambda x: x, method="sequential", vjp=vjp, skip_zero=True)
    xs = jnp.zeros(shape)
    assert_close(jax.grad(lambda xs: jax.vmap(f)(xs).sum())(xs), xs)
    assert_close(jax.jit(jax.grad(lambda xs: jax.vmap(f)(xs).sum()))(xs), xs)
    assert counts == []


def test_cotangents_of_a_shared_argument_are_summed_as_they_come():
    """1000 elements over a shared argument of 1 MB: one buffer of that size, not 1000."""
    shared = jnp.zeros(125_000)

    def vjp(args, cotangent, needed):
        del needed
        return None, np.full(args[1].shape, cotangent)

    f = batchrules.host_call(
        lambda x, w: x + w[0], jax.ShapeDtypeStruct((), "float64"), method="sequential", vjp=vjp, verify=False
    )
    gradient = jax.jit(jax.grad(lambda w: jax.vmap(f, (0, None))(jnp.zeros(1000), w).sum()))
    jax.block_until_ready(gradient(shared))
    tracemalloc.start()
    try:
        result = jax.block_until_ready(gradient(shared))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_close(result, jnp.full(125_000, 1000.0))
    assert peak < 10e6


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_argument_without_elements(method):
    """Outside jit: compiled, XLA has no need for a result without elements."""
    tail = Foreign("tail", lambda xp, s, z: s + s + xp.sum(z, axis=(-2, -1)), ((), (0, 2)))

    def vjp(args, cotangent, needed):
        return only((2 * cotangent, np.zeros_like(args[1])), needed)

    f = with_endpoints(tail, method, {"vjp": vjp}, ("vjp",))
    empty = jnp.zeros((0, 2))
    gradient = jax.grad(lambda s, z: jax.vmap(f, (0, None))(s, z).sum(), (0, 1))
    assert_close(gradient(SS, empty), (jnp.full(4, 2.0), empty))
    assert_close(jax.jit(gradient)(SS, empty), (jnp.full(4, 2.0), empty))
