"""Derivatives of host calls under every composition, for each method, set of endpoints and batch_size, jit or not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import FORWARD, REVERSE, SS, XS, YS, S, X, Y, assert_close, by_x, nest, total
from host_derivatives import ROOTS, WAVES
from host_endpoints import GIVEN, METHODS, VECTORISED, Endpoints
from jax.test_util import check_grads

import batchrules

FIRST = {**FORWARD, **REVERSE}
BATCH_SIZES = (None, 1, 3)
every_method = pytest.mark.parametrize("method", METHODS)
every_given = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)


def sets_of_endpoints(name):
    """A composition of one mode needs only one of `jvp` and `vjp`."""
    return {**GIVEN, "enough": ("jvp",) if name in FORWARD else ("vjp",)}


def covering_cases():
    """Every seventeenth case of all: each composition with each set of endpoints, and each pair of options together."""
    cases = itertools.chain.from_iterable(
        itertools.product([name], sets_of_endpoints(name), METHODS, BATCH_SIZES, ["jit", "eager"]) for name in FIRST
    )
    return [case for case in itertools.islice(cases, 0, None, 17) if case[2] != "sequential" or case[3] is None]


@pytest.fixture(scope="module")
def twin_results():
    """The twin's result for each composition, worked out once."""
    return {name: jax.jit(lambda c=c: c(WAVES.twin))() for name, c in FIRST.items()}


@pytest.mark.parametrize(("name", "given", "method", "batch_size", "way"), covering_cases())
def test_composition(name, given, method, batch_size, way, twin_results):
    f = Endpoints(WAVES, method).host_call(sets_of_endpoints(name)[given], batch_size=batch_size)
    run = jax.jit if way == "jit" else lambda program: program
    assert_close(run(lambda: FIRST[name](f))(), twin_results[name])


@every_method
@pytest.mark.parametrize("name", ["jvp of vmap", "vmap of grad", "grad of vmap", "grad of nested vmaps"])
def test_every_method(name, method, twin_results):
    f = Endpoints(WAVES, method).host_call(GIVEN["jvp, vjp"])
    assert_close(jax.jit(lambda: FIRST[name](f))(), twin_results[name])


@every_method
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_gradient_of_those_that_are_mapped_and_those_that_are_not(number, method):
    """jax.jit drops the others, which have other axes."""

    def gradient(f):
        return jax.grad(total(by_x(f)), (0, 1, 2))(XS, Y, S)[number]

    f = Endpoints(WAVES, method).host_call(GIVEN["jvp, vjp"])
    assert_close(jax.jit(lambda: gradient(f))(), gradient(WAVES.twin))


@every_given
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("name", ["vmap of grad", "jacrev of vmap"])
def test_auto_is_right_whatever_it_chooses(name, method, given, twin_results):
    endpoints = Endpoints(WAVES, method)
    endpoints.method = "auto" if method == "sequential" else method
    signature = None if method == "sequential" else "(i),(i),()->(i),(),(i)"
    f = batchrules.host_call(
        endpoints.call,
        WAVES.foreign.promise,
        signature=signature,
        **{endpoint: getattr(Endpoints(WAVES, method), endpoint) for endpoint in given},
    )
    assert f.method_for(XS, YS, SS).method == method
    assert_close(jax.jit(lambda: FIRST[name](f))(), twin_results[name])


@pytest.mark.parametrize("pass_outputs", [False, True])
@every_given
@every_method
def test_the_solution_reaches_its_endpoints(method, given, pass_outputs):
    """The derivatives of an implicit solver are written in its solution: `pass_outputs` saves solving again."""
    f = Endpoints(ROOTS, method).host_call(given, pass_outputs=pass_outputs)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return (
            jax.jvp(g, (XS, S), (YS, S)),
            jax.grad(lambda p, q: jnp.sin(g(p, q)["z"]).sum(), (0, 1))(XS, S),
            jax.vmap(jax.jacrev(f, (0, 1)), (None, 0))(X, SS),
            jax.jacfwd(f, (0, 1))(X, S),
            jax.jacrev(f, (0, 1))(X, S),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), derivatives(ROOTS.twin))
    assert_close(derivatives(f), derivatives(ROOTS.twin))


@pytest.mark.parametrize("pass_outputs", [False, True])
@pytest.mark.parametrize("given", [("jvp",), ("vjp",), ("jacobian",)], ids=str)
def test_the_outputs_are_passed_when_asked_for_only(given, pass_outputs):
    passed = []

    class Watched(Endpoints):
        def _point(self, args, outputs, *moving):
            passed.append(outputs)
            return super()._point(args, outputs, *moving)

    f = Watched(ROOTS, "expand_dims").host_call(given, pass_outputs=pass_outputs, verify=False)
    if given == ("vjp",):
        jax.jit(jax.grad(lambda p: by_root(f)(p, S)["z"].sum()))(XS)
    else:
        jax.jit(lambda p: jax.jvp(lambda p: by_root(f)(p, S), (p,), (YS,))[1])(XS)
    assert len(passed) == 1
    if pass_outputs:
        np.testing.assert_allclose(passed[0]["z"], by_root(ROOTS.twin)(XS, S)["z"])
    else:
        assert passed == [None]


def by_root(f):
    return jax.vmap(f, (0, None))


@pytest.mark.parametrize("mode", ["fwd", "rev"])
@every_given
def test_numerical_derivatives(given, mode):
    """A nonlinear function against finite differences."""
    f = Endpoints(WAVES, "expand_dims").host_call(given)
    check_grads(jax.jit(by_x(f)), (XS[:2], Y, S), order=1, modes=[mode])
    g = Endpoints(WAVES, "sequential").host_call(given)
    check_grads(g, (X, Y, S), order=1, modes=[mode])


NESTS = {
    "different arguments": lambda f: jax.vmap(jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, None)), (None, None, 0)),
    "the same twice": lambda f: jax.vmap(nest(f), (0, None, None)),
    "an axis of one": lambda f: jax.vmap(jax.vmap(f, (0, 0, None)), (None, None, 0)),
}
OF_NESTS = {
    "different arguments": (XS[:2], YS, SS[:3]),
    "the same twice": (XS[None, :3] * jnp.arange(1.0, 3)[:, None, None], YS[:2], SS[:2]),
    "an axis of one": (XS, YS, SS[:1]),
}


@every_given
@every_method
@pytest.mark.parametrize("name", NESTS)
def test_nested_vmaps(name, method, given):
    f = Endpoints(WAVES, method).host_call(given)

    def derivatives(f):
        g = NESTS[name](f)
        args = OF_NESTS[name]
        primals, pull = jax.vjp(g, *args)
        return primals, pull(jax.tree.map(jnp.cos, primals)), jax.jvp(g, args, args)[1], jax.jacrev(g, 2)(*args)

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(WAVES.twin))())


@every_method
@pytest.mark.parametrize("given", [GIVEN["jvp, vjp"], GIVEN["jacobian"]], ids=["jvp, vjp", "jacobian"])
def test_in_axes_and_out_axes(method, given):
    f = Endpoints(WAVES, method).host_call(given)

    def derivatives(f):
        g = jax.vmap(f, (1, None, 0), {"all": 1, "y": -1, "x": 0})
        primals, pull = jax.vjp(g, XS.T, Y, SS)
        pulled = jax.vmap(pull, out_axes=(1, -1, 0))(jax.tree.map(lambda p: jnp.stack([p, p + 1]), primals))
        return pulled, jax.jvp(g, (XS.T, Y, SS), (XS.T, Y, SS))

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(WAVES.twin))())


@every_given
@every_method
def test_empty_batch_makes_no_call(method, given):
    """No element: the cotangent of an unmapped argument is zero."""
    endpoints = Endpoints(WAVES, method)
    f = endpoints.host_call(given)
    gradient = jax.grad(total(by_x(f)), (0, 1, 2))
    assert_close(jax.jit(gradient)(XS[:0], Y, S), (XS[:0], jnp.zeros(3), jnp.zeros(())))
    assert_close(by_x(jax.grad(total(f), (0, 1)))(XS[:0], Y, S), (XS[:0], XS[:0]))
    assert_close(jax.jvp(by_x(f), (XS[:0], Y, S), (XS[:0], Y, S))[1]["x"], jnp.zeros(0))
    assert endpoints.counts == {}


@every_given
@every_method
def test_batch_of_one(method, given):
    f = Endpoints(WAVES, method).host_call(given)

    def derivatives(f):
        g = by_x(f)
        return jax.grad(total(g), (0, 1, 2))(XS[:1], Y, S), jax.jacfwd(g, 1)(XS[:1], Y, S), jax.jacrev(g)(XS[:1], Y, S)

    assert_close(jax.jit(lambda: derivatives(f))(), derivatives(WAVES.twin))


@every_given
@pytest.mark.parametrize("method", ["sequential", *VECTORISED[:1]])
def test_an_argument_given_twice_gets_the_sum(method, given):
    f = Endpoints(WAVES, method).host_call(given)
    assert_close(
        jax.jit(jax.vmap(jax.grad(lambda x, s: total(f)(x, x, s), (0, 1)), (0, None)))(XS, S),
        jax.vmap(jax.grad(lambda x, s: total(WAVES.twin)(x, x, s), (0, 1)), (0, None))(XS, S),
    )


def test_gradient_descent_under_jit():
    """The loop that all this is for."""
    f = Endpoints(WAVES, "expand_dims").host_call(("vjp",))

    def descended(f):
        def loss(x):
            return jnp.sum(jax.vmap(f, (None, 0, 0))(x, YS, SS)["all"] ** 2)

        return jax.lax.fori_loop(0, 5, lambda _, x: x - 0.01 * jax.grad(loss)(x), X)

    assert_close(jax.jit(lambda: descended(f))(), descended(WAVES.twin))
