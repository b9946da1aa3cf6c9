"""reduce= equals stacking and reducing, for values and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random
from hypothesis import given
from hypothesis import strategies as st

from batchrules._bmap import bmap

NAMES = ["sum", "mean", "max", "min"]
BATCHES = [(7, 3), (8, 3), (12, 5), (5, 100)]


def f(w, a):
    return jnp.tanh(w * a), jnp.sum(a), jnp.sum(w)


def stacked_then(name):
    return lambda w, a: jax.tree.map(lambda y: getattr(jnp, name)(y, axis=0), jax.vmap(f, (None, 0))(w, a))


def arguments(size):
    return random(3), random((size, 3), 1)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "batch_size"), BATCHES)
def test_values(name, size, batch_size, jit):
    ours = bmap(f, (None, 0), batch_size=batch_size, reduce=name)
    assert_close((jax.jit(ours) if jit else ours)(*arguments(size)), stacked_then(name)(*arguments(size)))


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_derivatives(name, transform, checkpoint):
    ours = bmap(f, (None, 0), batch_size=3, reduce=name, checkpoint=checkpoint)
    assert_close(jax.jit(transform(ours, (0, 1)))(*arguments(8)), transform(stacked_then(name), (0, 1))(*arguments(8)))


@pytest.mark.parametrize("name", ["max", "min"])
def test_equal_extrema_share_the_derivative(name):
    a = jnp.array([1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.5])
    ours = jax.grad(bmap(lambda x: x, batch_size=2, reduce=name))
    assert_close(ours(a), jax.grad(getattr(jnp, name))(a))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float16", "bfloat16", "float32"])
def test_dtypes(name, dtype):
    a = (jnp.arange(11) % 5).astype(dtype)
    ours, twin = bmap(lambda x: x, batch_size=3, reduce=name)(a), getattr(jnp, name)(a)
    assert ours.dtype == twin.dtype
    assert abs(float(ours) - float(twin)) <= 2e-2 * abs(float(twin))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_bools_that_are_all_equal(name, value, batch_size):
    reduced = bmap(lambda x: x, batch_size=batch_size, reduce=name)(jnp.full(7, value))
    assert (reduced.dtype, bool(reduced)) == (jnp.bool_, value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_single_precision(dtype):
    ones = jnp.ones(3000, dtype)
    assert bmap(lambda x: x, batch_size=1, reduce="sum")(ones) == jnp.sum(ones)
    assert bmap(lambda x: x, batch_size=1, reduce="mean")(ones) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(name, bad):
    for a in (jnp.array([1.0, bad, 2.0, 3.0, 0.0]), jnp.full(5, bad)):
        assert_close(bmap(lambda x: x, batch_size=2, reduce=name)(a), getattr(jnp, name)(a))


def test_the_mean_is_right_when_a_chunk_is_smaller():
    a = random(7)
    assert_close(bmap(lambda x: x, batch_size=5, reduce="mean")(a), jnp.mean(a))


def test_one_reduction_for_each_part_of_the_output():
    def g(a):
        return {"stacked": a, "sum": (a, a**2), "max": a, "fold": a}

    reduce = {"stacked": None, "sum": "sum", "max": "max", "fold": (1.0, lambda x, y: x * y)}
    a = random((7, 2))
    twin = {"stacked": a, "sum": (jnp.sum(a, 0), jnp.sum(a**2, 0)), "max": jnp.max(a, 0), "fold": jnp.prod(a, 0)}
    assert_close(bmap(g, batch_size=3, reduce=reduce)(a), twin)


def logsumexp(a, b):
    top = jnp.maximum(a[0], b[0])
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)


@pytest.mark.parametrize(("size", "batch_size"), BATCHES)
def test_a_reduction_of_ones_own(size, batch_size):
    a = random(size)

    def ours(a):
        top, total = bmap(lambda x: (x, 1.0), batch_size=batch_size, reduce=((-1e300, 0.0), logsumexp))(a)
        return top + jnp.log(total)

    assert_close(jax.jit(ours)(a), jax.nn.logsumexp(a))
    assert_close(jax.grad(ours)(a), jax.nn.softmax(a))


@pytest.mark.parametrize(("size", "batch_size"), BATCHES)
def test_its_order_is_kept(size, batch_size):
    """Matrix products do not commute."""
    a = random((size, 2, 2))
    ours = bmap(lambda x: x, batch_size=batch_size, reduce=(jnp.eye(2), jnp.matmul))(a)
    assert_close(ours, jnp.asarray(functools.reduce(np.matmul, np.asarray(a))))


def test_an_init_that_is_differentiated():
    a = random(7)
    ours = jax.grad(lambda s: bmap(lambda x: x, batch_size=3, reduce=(s, lambda x, y: x * y))(a))
    assert_close(ours(jnp.asarray(2.0)), jnp.prod(a))


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    a = random((3, 7))
    assert_close(jax.vmap(bmap(lambda x: x, batch_size=3, reduce=name))(a), getattr(jnp, name)(a, axis=1))
    assert_close(
        jax.vmap(jax.grad(bmap(jnp.sin, batch_size=3, reduce=name)))(a),
        jax.vmap(jax.grad(lambda b: getattr(jnp, name)(jnp.sin(b))))(a),
    )


@given(st.integers(0, 12), st.integers(1, 13), st.sampled_from(["sum", "mean"]))
def test_any_length_and_batch_size(size, batch_size, name):
    if (size, name) == (0, "mean"):
        return  # 0 / 0
    a = random((size, 2))
    assert_close(bmap(jnp.sin, batch_size=batch_size, reduce=name)(a), getattr(jnp, name)(jnp.sin(a), axis=0))


@pytest.mark.parametrize("name", ["max", "min"])
def test_nothing_has_no_extremum(name):
    with pytest.raises(ValueError, match=r"axis of size 0|zero-size"):
        bmap(lambda x: x, batch_size=3, reduce=name)(jnp.zeros(0))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("batch_size", [3, None])
def test_nothing_has_no_extremum_of_what_every_element_shares(name, batch_size):
    """The value of one element is known here, though there is none."""
    ours = bmap(lambda _: 3.0, out_axes=None, batch_size=batch_size, reduce=name)
    with pytest.raises(ValueError, match=f'reduce="{name}" of an axis of size 0 has no value'):
        ours(jnp.zeros(0))


@pytest.mark.parametrize("name", ["max", "min"])
def test_second_derivatives_at_infinity(name):
    a = jnp.array([jnp.inf, 1.0, 2.0, -jnp.inf, 0.5])
    hessian = jax.hessian(bmap(lambda x: x, batch_size=2, reduce=name))(a)
    assert_close(hessian, jnp.zeros((5, 5)))
