"""Second derivatives of host calls, by endpoints that are host calls with endpoints of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import SECOND, SS, XS, YS, S, X, Y, assert_close, by_x, total
from host_derivatives import ROOTS, WAVES
from host_endpoints import METHODS, Endpoints
from jax.test_util import check_grads

import batchrules

every_method = pytest.mark.parametrize("method", METHODS)
passing = pytest.mark.parametrize("pass_outputs", [False, True], ids=["", "outputs"])


def twice(smooth, method, **options):
    """The host call of a function with endpoints that can be differentiated."""
    endpoints = Endpoints(smooth, method)
    return endpoints.bare(**endpoints.twice(), **options)


@pytest.fixture(scope="module")
def twin_results():
    """The twin's result for each composition, worked out once."""
    return {name: jax.jit(lambda c=c: c(WAVES.twin))() for name, c in SECOND.items()}


@every_method
@pytest.mark.parametrize("name", SECOND)
def test_composition(name, method, twin_results):
    f = twice(WAVES, method)
    assert_close(jax.jit(lambda: SECOND[name](f))(), twin_results[name])


@pytest.mark.parametrize("name", SECOND)
def test_composition_with_the_outputs(name, twin_results):
    f = twice(WAVES, "expand_dims", pass_outputs=True)
    assert_close(jax.jit(lambda: SECOND[name](f))(), twin_results[name])


@passing
@pytest.mark.parametrize("name", ["hessian", "jacrev of jacrev", "jvp of grad", "vmap of hessian"])
def test_outside_jit(name, pass_outputs, twin_results):
    f = twice(WAVES, "broadcast_all", pass_outputs=pass_outputs)
    assert_close(SECOND[name](f), twin_results[name])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["hessian of vmap", "hessian of nested vmaps", "jacrev of jacfwd"])
def test_batch_size(name, batch_size, twin_results):
    f = twice(WAVES, "legacy_vectorized", batch_size=batch_size)
    assert_close(jax.jit(lambda: SECOND[name](f))(), twin_results[name])


# How the derivatives of an implicit solver are written: in its solution.
OF_THE_SOLUTION = {
    "hessian": lambda f: jax.hessian(lambda p, q: jnp.sin(f(p, q)["z"]).sum(), (0, 1))(X, S),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f, (0, 1)), (0, 1))(X, S),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1))(X, S),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f, 0), 1)(X, S),
    "hessian of vmap": lambda f: jax.hessian(lambda q: (jax.vmap(f, (0, None))(XS, q)["z"] ** 2).sum())(S),
    "vmap of hessian": lambda f: jax.vmap(jax.hessian(lambda p, q: (f(p, q)["z"] ** 2).sum()), (None, 0))(X, SS),
}


@passing
@pytest.mark.parametrize("method", ["sequential", "legacy_vectorized"])
@pytest.mark.parametrize("name", OF_THE_SOLUTION)
def test_endpoints_of_endpoints_give_the_total_derivative(name, method, pass_outputs):
    f = twice(ROOTS, method, pass_outputs=pass_outputs)
    program = OF_THE_SOLUTION[name]
    assert_close(jax.jit(lambda: program(f))(), program(ROOTS.twin))


@passing
@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_numerical_derivatives_of_second_order(modes, pass_outputs):
    f = twice(WAVES, "expand_dims", pass_outputs=pass_outputs)
    check_grads(jax.jit(by_x(f)), (XS[:2], Y, S), order=2, modes=[modes])


def test_a_hessian_is_not_transposed():
    """d/dx d/dy of each output, against the same by hand: the mixed second derivatives are not symmetric."""
    f = twice(WAVES, "expand_dims")
    mixed = jax.jit(jax.jacfwd(jax.jacrev(lambda x, y: f(x, y, S)["all"], 1), 0))(X, Y)
    assert mixed.shape == (3, 3, 3)
    assert not np.allclose(mixed, jnp.swapaxes(mixed, 1, 2))
    eye, ones = np.eye(3), np.ones(3)
    by_hand = (
        np.einsum("ij,jk,j->ijk", eye, eye, 2 * np.cos(X) * Y * S)
        + np.einsum("i,jk->ijk", np.cos(Y), eye)
        - np.einsum("ij,j,k->ijk", eye, np.sin(Y), Y * ones)
    )
    np.testing.assert_allclose(mixed, by_hand, rtol=1e-9)


# What a product of Hessian and vector takes: one call of each endpoint concerned, however many vectors.
PRODUCTS = {
    "one": lambda f: jax.jvp(jax.grad(lambda x: f(x, Y, S)["all"].sum()), (X,), (Y,))[1],
    "many": lambda f: jax.vmap(lambda t: jax.jvp(jax.grad(lambda x: f(x, Y, S)["all"].sum()), (X,), (t,))[1])(XS),
    "of a batch": lambda f: jax.jvp(jax.vmap(jax.grad(lambda x: f(x, Y, S)["all"].sum())), (XS,), (YS,))[1],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_calls_of_a_hessian_vector_product(name):
    """The gradient itself is not used, and the cotangent does not move: only the derivative of `vjp` is called."""
    counts = {"jvp_of_jvp": 0, "vjp_of_jvp": 0, "jvp_of_vjp": 0, "vjp_of_vjp": 0}

    class Counted(Endpoints):
        def jvp_of_vjp(self, *args):
            counts["jvp_of_vjp"] += 1
            return super().jvp_of_vjp(*args)

        def jvp_of_jvp(self, *args):
            counts["jvp_of_jvp"] += 1
            return super().jvp_of_jvp(*args)

    endpoints = Counted(WAVES, "expand_dims")
    f = endpoints.bare(**endpoints.twice(), verify=False)
    assert_close(jax.jit(lambda: PRODUCTS[name](f))(), PRODUCTS[name](WAVES.twin))
    assert endpoints.counts == {}
    assert counts == {"jvp_of_jvp": 0, "vjp_of_jvp": 0, "jvp_of_vjp": 1, "vjp_of_vjp": 0}


def test_linear_parts_need_no_second_derivatives():
    """A derivative is linear in its tangents and cotangents: there, it is its own derivative."""
    f = Endpoints(WAVES, "expand_dims").host_call(("jvp", "vjp"))

    def in_the_tangent(f):
        return jax.jacfwd(lambda t: jax.jvp(f, (X, Y, S), (t, Y, S))[1])(X)

    def in_the_cotangent(f):
        pull = jax.vjp(f, X, Y, S)[1]
        return jax.jacrev(lambda c: pull({"all": c, "y": Y, "x": S}))(X), jax.jacfwd(
            lambda c: pull({"all": c, "y": Y, "x": S})
        )(X)

    def back_and_forth(f):
        pull = jax.linear_transpose(jax.linear_transpose(jax.linearize(f, X, Y, S)[1], X, Y, S), f(X, Y, S))
        return pull((Y, X, S))

    for program in (in_the_tangent, in_the_cotangent, back_and_forth):
        assert_close(jax.jit(lambda p=program: p(f))(), program(WAVES.twin))


ENDPOINTS_WITHOUT_DERIVATIVES = {
    "hessian": lambda f: jax.hessian(lambda x: f(x, Y, S)["all"].sum())(X),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f))(X, Y, S),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f))(X, Y, S),
}


@pytest.mark.parametrize("given", [("jvp", "vjp"), ("jacobian",)], ids=str)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ENDPOINTS_WITHOUT_DERIVATIVES)
def test_plain_endpoints_have_no_derivatives(name, jit, given):
    f = Endpoints(WAVES, "sequential").host_call(given)
    program = (lambda: ENDPOINTS_WITHOUT_DERIVATIVES[name](f)) if not jit else jax.jit(
        lambda: ENDPOINTS_WITHOUT_DERIVATIVES[name](f)
    )  # fmt: skip
    with pytest.raises(batchrules.DerivativeError, match=r"waves.*host_call"):
        program()


def test_gradient_of_a_gradient_penalty():
    """A loss in which a gradient stands, as in sensitivity and Sobolev training."""
    f = twice(WAVES, "expand_dims")

    def penalty(f):
        slope = jax.vmap(jax.grad(total(f)), (0, None, None))
        return jax.grad(lambda y, s: jnp.sum(slope(XS, y, s) ** 2), (0, 1))(Y, S)

    assert_close(jax.jit(lambda: penalty(f))(), jax.jit(lambda: penalty(WAVES.twin))())


NUMBER = jax.ShapeDtypeStruct((), "float64")


def slope(args, cotangent, needed):
    """The vjp of x·exp(y), in y only."""
    del needed
    x, y = args
    return None, cotangent * x * np.exp(y)


def slope_jvp(primals, tangents, outputs):
    """The jvp of `slope` in y, written in its result."""
    del primals
    return None, outputs[1] * tangents[0][1]


def by_its_own_outputs(method):
    """x·exp(y), whose vjp is a host call that is differentiated by its own outputs."""
    pull = batchrules.host_call(
        slope, lambda *_: (None, NUMBER), static_argnames="needed", pass_outputs=True, jvp=slope_jvp, method=method
    )
    return batchrules.host_call(lambda x, y: x * np.exp(y), NUMBER, vjp=pull, method=method)


SHARED = {
    "a batch": lambda f, y: jax.vmap(f, (0, None))(XS[:, 0], y).sum(),
    "two batches": lambda f, y: jax.vmap(jax.vmap(f, (0, None)), (1, None))(XS, y).sum(),
    "one of two": lambda f, y: jax.vmap(lambda z: jax.vmap(f, (0, None))(XS[:, 0], z))(y * XS[0]).sum(),
}


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
@pytest.mark.parametrize("name", SHARED)
def test_outputs_that_a_derivative_is_given_are_not_summed_over_the_batch(name, method):
    def second(f):
        return jax.jacfwd(jax.grad(lambda y: SHARED[name](f, y)))

    # Compiled: nothing uses the first jvp of the function, which has none.
    assert_close(jax.jit(second(by_its_own_outputs(method)))(0.5), second(lambda x, y: x * jnp.exp(y))(0.5))
