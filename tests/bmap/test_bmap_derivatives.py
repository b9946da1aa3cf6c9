"""Derivatives of bmap equal those of jax.vmap, in every mode, to every order, with and without checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import (
    NETWORK_AXES,
    NETWORK_OUT_AXES,
    assert_close,
    network,
    network_arguments,
    random,
    sum_of_sines,
)
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from batchrules._bmap import bmap

TWIN = jax.vmap(network, NETWORK_AXES, NETWORK_OUT_AXES)
BATCHES = [(7, 3), (8, 3), (12, 4)]  # a smaller first chunk, equal chunks; 8 and 12 elements lie in blocks
ALL = (0, 1, 2)


@pytest.fixture(params=[False, True], ids=["", "checkpoint"])
def mapped(request):
    return functools.partial(bmap, network, NETWORK_AXES, NETWORK_OUT_AXES, checkpoint=request.param)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), BATCHES)
@pytest.mark.parametrize("argnums", [1, ALL])
def test_grad(mapped, size, batch_size, argnums, jit):
    args = network_arguments(size)
    ours = jax.grad(sum_of_sines(mapped(batch_size=batch_size)), argnums)
    assert_close((jax.jit(ours) if jit else ours)(*args), jax.grad(sum_of_sines(TWIN), argnums)(*args))


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize(("size", "batch_size"), BATCHES)
def test_jacobians(mapped, transform, size, batch_size):
    args = network_arguments(size)
    assert_close(jax.jit(transform(mapped(batch_size=batch_size), ALL))(*args), transform(TWIN, ALL)(*args))


@pytest.mark.parametrize(("size", "batch_size"), BATCHES)
def test_jvp_and_vjp(mapped, size, batch_size):
    args, moved = network_arguments(size), tuple(jnp.cos(x) for x in network_arguments(size))
    ours = mapped(batch_size=batch_size)
    assert_close(jax.jvp(ours, args, moved), jax.jvp(TWIN, args, moved))
    (result, pull), (twin, twin_pull) = jax.vjp(ours, *args), jax.vjp(TWIN, *args)
    assert_close(result, twin)
    assert_close(pull(jax.tree.map(jnp.cos, result)), twin_pull(jax.tree.map(jnp.cos, twin)))


@pytest.mark.parametrize("second", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("first", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize(("size", "batch_size"), [(7, 3), (8, 3)])
def test_second_derivatives(mapped, first, second, size, batch_size):
    args = network_arguments(size)
    ours = jax.jit(second(first(sum_of_sines(mapped(batch_size=batch_size)), (0, 1)), (0, 1)))
    assert_close(ours(*args), second(first(sum_of_sines(TWIN), (0, 1)), (0, 1))(*args))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_third_derivative(checkpoint):
    ours = jax.grad(jax.grad(jax.grad(lambda s: jnp.sum(bmap(jnp.sin, batch_size=3, checkpoint=checkpoint)(s * a)))))
    a, s = random(7), random(())
    assert_close(ours(s), jax.grad(jax.grad(jax.grad(lambda s: jnp.sum(jnp.sin(s * a)))))(s))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_vmap_of_grad_of_bmap(checkpoint):
    a = random((3, 7))
    ours = jax.vmap(jax.grad(lambda a: jnp.sum(bmap(jnp.sin, batch_size=3, checkpoint=checkpoint)(a) ** 2)))
    assert_close(jax.jit(ours)(a), 2 * jnp.sin(a) * jnp.cos(a))


def test_bmap_of_grad():
    a, w = random((8, 4)), random((4, 4), 1)
    gradient = jax.grad(lambda w, a: jnp.sum(jnp.tanh(w @ a)))
    assert_close(bmap(gradient, (None, 0), batch_size=3)(w, a), jax.vmap(gradient, (None, 0))(w, a))


def test_grad_of_nested_bmap():
    a = random((7, 5))
    ours = jax.grad(lambda a: jnp.sum(bmap(bmap(jnp.sin, batch_size=2, checkpoint=True), batch_size=3)(a)))
    assert_close(jax.jit(ours)(a), jnp.cos(a))


def test_results_that_do_not_take_part():
    """Integers, keys, and results of which no one needs a derivative."""

    def f(a, b, n, key):
        return a * jax.random.normal(key), jnp.sin(b), n, key

    args = random(7), random(7, 1), jnp.arange(7), jax.random.split(jax.random.key(0), 7)

    def first(by):
        return lambda *args: jnp.sum(by(f)(*args)[0] ** 2)

    ours = jax.jit(jax.grad(first(functools.partial(bmap, batch_size=3)), (0, 1)))
    assert_close(ours(*args), jax.grad(first(jax.vmap), (0, 1))(*args))


@pytest.mark.parametrize("size", [7, 8])
def test_linear_transpose(size):
    weights, ct = random((4, 3)), random((size, 4), 1)
    ours = jax.linear_transpose(bmap(lambda a: weights @ a, batch_size=3), random((size, 3)))
    assert_close(ours(ct), (ct @ weights,))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_complex_numbers(checkpoint):
    def f(w, z):
        return jnp.exp(1j * w * z), lax.complex(jnp.real(z), jnp.ones(())) * w

    def loss(by):
        return lambda w, z: sum(jnp.sum(jnp.abs(y) ** 2) for y in by(f, in_axes=(None, 0))(w, z))

    args = lax.complex(random(()), random((), 3)), lax.complex(random(7, 1), random(7, 2))
    ours = functools.partial(bmap, batch_size=3, checkpoint=checkpoint)
    assert_close(jax.jit(jax.grad(loss(ours), (0, 1)))(*args), jax.grad(loss(jax.vmap), (0, 1))(*args))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_custom_rules_inside(checkpoint):
    @jax.custom_vjp
    def f(a):
        return jnp.sin(a)

    f.defvjp(lambda a: (jnp.sin(a), a), lambda a, ct: (3 * ct * a,))
    a = random(7)
    assert_close(jax.grad(lambda a: jnp.sum(bmap(f, batch_size=3, checkpoint=checkpoint)(a)))(a), 3 * a)


def test_no_derivative_is_asked_of_arguments_that_have_none():
    def f(n, a):
        result = jax.ShapeDtypeStruct((), "float64")
        return jax.pure_callback(lambda n: np.asarray(n, "float64"), result, n, vmap_method="expand_dims") * a

    n, a = jnp.arange(7), random(7)
    assert_close(jax.grad(lambda a: jnp.sum(bmap(f, batch_size=3)(n, a)))(a), n.astype("float64"))


# Results that have an input's type, and so share the arrays of their derivatives with it.
SHARING = {
    "in_turn": lambda a, b: (a * b, a + jnp.sin(b)),
    "crossed": lambda a, b: (b, a),
    "one_result": lambda a, b: jnp.sin(a) * b,
    "same_twice": lambda a, b: (a * b, a * b),
    "one_does_not_move": lambda a, b: (lax.stop_gradient(a), a * b),
    "constant": lambda a, b: (jnp.ones_like(a), a * b),
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), [(7, 3), (8, 3), (9, 3)])
@pytest.mark.parametrize("f", SHARING.values(), ids=SHARING)
def test_results_of_an_inputs_type(f, size, batch_size, checkpoint):
    args = random(size), random(size, 1)
    ours, twin = bmap(f, batch_size=batch_size, checkpoint=checkpoint), jax.vmap(f)
    assert_close(jax.jit(jax.jacrev(ours, (0, 1)))(*args), jax.jacrev(twin, (0, 1))(*args))
    assert_close(jax.jit(jax.jacfwd(ours, 1))(*args), jax.jacfwd(twin, 1)(*args))
    assert_close(
        jax.jit(jax.hessian(sum_of_sines(ours), (0, 1)))(*args), jax.hessian(sum_of_sines(twin), (0, 1))(*args)
    )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("in_axis", "out_axis"), [(0, 1), (1, 0)])
def test_a_result_of_an_inputs_type_along_another_axis(in_axis, out_axis, checkpoint):
    """A square array and its transpose are of one type, and are cut into chunks of another shape each."""
    a = random((5, 5))

    def loss(by):
        mapped = by(lambda a: jnp.sin(a) * jnp.arange(1.0, 6.0), in_axis, out_axis)
        return lambda a: jnp.sum(mapped(a) * jnp.cos(a))

    ours = jax.jit(jax.grad(loss(functools.partial(bmap, batch_size=2, checkpoint=checkpoint))))
    assert_close(ours(a), jax.grad(loss(jax.vmap))(a))


@pytest.mark.parametrize("outer", [jax.vmap, functools.partial(bmap, batch_size=2)], ids=["vmap", "bmap"])
def test_results_of_an_inputs_type_in_a_batch(outer):
    def loss(by):
        return lambda a, b: jnp.sum(jnp.sin(by(by(lambda a, b: jnp.sin(a) * b), (0, None))(a, b)))

    def ours(f, in_axes=0):
        return (functools.partial(bmap, batch_size=3) if in_axes == 0 else outer)(f, in_axes)

    args = random((5, 7)), random(7, 1)
    assert_close(jax.jit(jax.grad(loss(ours), (0, 1)))(*args), jax.grad(loss(jax.vmap), (0, 1))(*args))


def without_derivative(a):
    """The value, by a function that raises an error when a derivative is asked of it."""
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((), "float64"), a, vmap_method="expand_dims")


def test_no_derivative_is_asked_of_an_input_that_does_not_move():
    a, b = random(7), random(7, 1)
    ours = bmap(lambda a, b: without_derivative(a) * b, batch_size=3)
    assert_close(jax.grad(lambda b: jnp.sum(ours(a, b)))(b), a)


def test_no_derivative_is_asked_of_a_result_that_does_not_move():
    def loss(a):
        still, moving = bmap(lambda a: (jnp.floor(a), jnp.sin(a)), batch_size=3)(a)
        return jnp.sum(jax.vmap(without_derivative)(still) * moving)

    a = 3 * random(7)
    assert_close(jax.grad(loss)(a), jnp.floor(a) * jnp.cos(a))


@given(st.sampled_from([0, 1, 2]), st.sampled_from([0, 1, -1]), st.integers(1, 9), st.integers(1, 8), st.booleans())
def test_gradients_along_any_axis(in_axis, out_axis, size, batch_size, checkpoint):
    shape = [2, 3]
    shape.insert(in_axis, size)
    a, w = random(shape), random((2, 3), 1)

    def loss(by):
        return lambda w, a: jnp.sum(jnp.sin(by(lambda w, a: jnp.tanh(w * a), (None, in_axis), out_axis)(w, a)))

    ours = functools.partial(bmap, batch_size=batch_size, checkpoint=checkpoint)
    assert_close(jax.grad(loss(ours), (0, 1))(w, a), jax.grad(loss(jax.vmap), (0, 1))(w, a))


OPERATORS = {
    "constant first": lambda m: lambda x: m(lambda a, x: a * x)(OTHERS, x),
    "constant last": lambda m: lambda x: m(lambda x, a: a * x)(x, OTHERS),
    "compiled": lambda m: lambda x: jax.jit(m(lambda a, x: a * x))(OTHERS, x),
    "in a scan": lambda m: (
        lambda x: jax.lax.scan(lambda c, _: (m(lambda a, x: a * x)(OTHERS, c), None), x, None, length=2)[0]
    ),
    "in a checkpoint": lambda m: jax.checkpoint(lambda x: m(lambda a, x: a * x)(OTHERS, x)),
    "a result that does not depend on it": lambda m: lambda x: _product(m(lambda a, x: (jnp.sin(a), a * x))(OTHERS, x)),
    "the same, constant last": lambda m: lambda x: _product(m(lambda x, a: (jnp.sin(a), a * x))(x, OTHERS)),
    "a number that does not depend on it": lambda m: (
        lambda x: _product(m(lambda a, x: (jnp.sin(a).sum(keepdims=True), a * x))(OTHERS, x))
    ),
}
OTHERS = jnp.linspace(1.0, 2.0, 12).reshape(6, 2)


def _product(results):
    return results[0] * results[1]


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_linear_transpose_beside_a_mapped_constant(operator, batch_size):
    def transposed(mapping):
        return jax.linear_transpose(OPERATORS[operator](mapping), jnp.zeros((6, 2)))(OTHERS + 1)

    check_equal = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    check_equal(transposed(lambda f: bmap(f, batch_size=batch_size))[0], transposed(jax.vmap)[0])


def test_grad_through_a_solver_whose_operator_is_chunked():
    def solved(mapping, scales):
        def operator(x):
            return mapping(lambda a, x: a * x)(scales, x)

        return jax.scipy.sparse.linalg.bicgstab(operator, jnp.ones((6, 2)))[0].sum()

    wanted = jax.grad(functools.partial(solved, jax.vmap))(OTHERS)
    got = jax.grad(functools.partial(solved, lambda f: bmap(f, batch_size=4)))(OTHERS)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


CHECKED = {
    "relu": jax.nn.relu,
    "cond": lambda a: jax.lax.cond(a[0] > 0, jnp.sin, jnp.cos, a),
    "update": lambda a: a.at[1].mul(3.0),
    "abs": lambda a: jnp.abs(a) * a,
    "sort": jnp.sort,
}


@pytest.mark.parametrize("f", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_programs_stand_up_to_jaxs_own_checks(f, checkpoint):
    """`jax_enable_checks` has JAX look at the types of everything that it computes with."""
    ours, a = bmap(f, batch_size=3, checkpoint=checkpoint), random((7, 4))

    def second(mapped):
        gradient = jax.grad(lambda a: jnp.sum(jnp.sin(mapped(a))))
        return jax.jvp(gradient, (a,), (a,))

    twin = second(jax.vmap(f))
    jax.config.update("jax_enable_checks", True)
    try:
        assert_close(second(ours), twin)
        assert_close(jax.jit(functools.partial(second, ours))(), twin)
        assert_close(jax.linearize(ours, a)[1](a), jax.jvp(jax.vmap(f), (a,), (a,))[1])
    finally:
        jax.config.update("jax_enable_checks", False)
