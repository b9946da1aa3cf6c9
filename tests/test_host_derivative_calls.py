"""How often the endpoints of a host call are called, with what shapes, and what they are asked for."""

import jax
import jax.numpy as jnp
import pytest
from compositions import SS, XS, YS, S, X, Y, assert_close, by_x, nest
from host_derivatives import ROOTS, WAVES
from host_endpoints import GIVEN, VECTORISED, Endpoints

every_vectorised = pytest.mark.parametrize("method", VECTORISED)
JVP_VJP = GIVEN["jvp, vjp"]
F, T = False, True
ALL_OUT = {"all": T, "y": T, "x": T}


def calls(smooth, method, given, program, **options):
    """The calls that a program takes, by endpoint, and what the endpoints were asked for."""
    endpoints = Endpoints(smooth, method)
    f = endpoints.host_call(given, verify=False, **options)
    jax.block_until_ready(program(f))
    return endpoints


def summed(f):
    """A linear function of the outputs: its gradient needs no output."""

    def function(*args):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(*args)))

    return function


def of_all(transform):
    return lambda f: transform(f, argnums=(0, 1, 2))


def under_jit(program):
    return lambda f: jax.jit(lambda: program(f))()


# A program, and the calls that it takes of a vectorised function.
ONE_CALL_EACH = {
    "vmap": (lambda f: jax.vmap(f)(XS, YS, SS), {"call": 1}),
    "nested vmap": (lambda f: nest(f)(XS, YS, SS), {"call": 1}),
    "jvp": (lambda f: jax.jvp(f, (X, Y, S), (Y, X, S)), {"call": 1, "jvp": 1}),
    "grad": (lambda f: of_all(jax.grad)(summed(f))(X, Y, S), {"vjp": 1}),
    "value_and_grad": (lambda f: jax.value_and_grad(summed(f))(X, Y, S), {"call": 1, "vjp": 1}),
    "vmap of grad": (lambda f: jax.vmap(of_all(jax.grad)(summed(f)))(XS, YS, SS), {"vjp": 1}),
    "vmap of grad, unmapped": (lambda f: by_x(of_all(jax.grad)(summed(f)))(XS, Y, S), {"vjp": 1}),
    "grad of vmap": (lambda f: of_all(jax.grad)(summed(by_x(f)))(XS, Y, S), {"vjp": 1}),
    "grad of nested vmaps": (lambda f: of_all(jax.grad)(summed(nest(f)))(XS, YS, SS), {"vjp": 1}),
    "jvp of vmap": (lambda f: jax.jvp(by_x(f), (XS, Y, S), (XS, Y, S))[1], {"jvp": 1}),
    "vmap of jvp": (lambda f: jax.vmap(lambda t: jax.jvp(f, (X, Y, S), (t, Y, S))[1])(XS), {"jvp": 1}),
    "jacfwd": (lambda f: jax.jacfwd(f)(X, Y, S), {"jvp": 1}),
    "jacrev": (lambda f: jax.jacrev(lambda *args: f(*args)["all"])(X, Y, S), {"vjp": 1}),
    "vmap of jacfwd": (lambda f: by_x(jax.jacfwd(f))(XS, Y, S), {"jvp": 1}),
    "vmap of jacrev": (lambda f: by_x(jax.jacrev(lambda *args: f(*args)["all"]))(XS, Y, S), {"vjp": 1}),
    "jacfwd of vmap": (lambda f: jax.jacfwd(by_x(f))(XS, Y, S), {"jvp": 1}),
    "jacrev of vmap": (lambda f: jax.jacrev(lambda *args: by_x(f)(*args)["all"])(XS, Y, S), {"vjp": 1}),
    "jacrev of nested vmaps": (lambda f: jax.jacrev(lambda *args: nest(f)(*args)["all"])(XS, YS, SS), {"vjp": 1}),
    "vmap of vmap of jacrev": (
        lambda f: jax.vmap(jax.vmap(jax.jacrev(lambda *args: f(*args)["y"], 1)))(
            *(jnp.stack([a, a]) for a in (XS, YS, SS))
        ),
        {"vjp": 1},
    ),
}


@every_vectorised
@pytest.mark.parametrize("name", ONE_CALL_EACH)
def test_a_vectorised_function_is_called_once(name, method):
    program, wanted = ONE_CALL_EACH[name]
    assert calls(WAVES, method, JVP_VJP, under_jit(program)).counts == wanted


@pytest.mark.parametrize("name", ["vmap of grad", "jacfwd", "jacrev", "jacrev of nested vmaps"])
def test_outside_jit_too(name):
    """Nothing is dropped there: the primal call is made as well."""
    program, wanted = ONE_CALL_EACH[name]
    assert calls(WAVES, "expand_dims", JVP_VJP, program).counts == {"call": 1, **wanted}


@every_vectorised
def test_rows_of_all_outputs_go_out_together(method):
    assert calls(WAVES, method, JVP_VJP, under_jit(UNBATCHED["jacrev"])).counts == {"vjp": 1}


UNBATCHED = {
    "jacfwd": lambda f: of_all(jax.jacfwd)(f)(X, Y, S),
    "jacrev": lambda f: of_all(jax.jacrev)(f)(X, Y, S),
    "jacfwd in one argument": lambda f: jax.jacfwd(f, 2)(X, Y, S),
    "jacrev of one output": lambda f: jax.jacrev(lambda *args: f(*args)["all"], 1)(X, Y, S),
    "vmap of jvp": lambda f: jax.vmap(lambda t: jax.jvp(f, (X, Y, S), (t, Y, S))[1])(XS),
    "vmap of linearized": lambda f: jax.vmap(jax.linearize(f, X, Y, S)[1], (0, None, 0))(XS, Y, SS),
}


@pytest.mark.parametrize("given", [GIVEN["jacobian"], GIVEN["all"]], ids=["jacobian", "all"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "legacy_vectorized"])
@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_arguments_take_one_jacobian(name, method, given):
    endpoints = calls(WAVES, method, given, under_jit(UNBATCHED[name]))
    assert endpoints.counts == {"jacobian": 1}
    assert endpoints.logs["jacobian"].given == [((3,), (3,), ())]


@pytest.mark.parametrize(
    ("name", "counts"), [("grad", {"vjp": 1}), ("vmap of grad", {"vjp": 1}), ("jvp of vmap", {"jvp": 1})]
)
def test_a_jacobian_is_not_used_where_it_would_be_larger(name, counts):
    assert calls(WAVES, "expand_dims", GIVEN["all"], under_jit(ONE_CALL_EACH[name][0])).counts == counts


@every_vectorised
@pytest.mark.parametrize("name", ["vmap of grad", "grad of vmap", "vmap of jacfwd", "vmap of jacrev"])
def test_a_jacobian_of_batched_arguments_is_one_call(name, method):
    counts = calls(WAVES, method, ("jacobian",), under_jit(ONE_CALL_EACH[name][0])).counts
    assert counts == {"jacobian": 1}


@pytest.mark.parametrize(("batch_size", "wanted"), [(1, 12), (3, 4), (5, 3), (100, 1)])
def test_batch_size_counts_elements_and_rows(batch_size, wanted):
    """4 elements with 3 rows each."""
    program = under_jit(lambda f: by_x(jax.jacrev(lambda *args: f(*args)["all"]))(XS, Y, S))
    endpoints = calls(WAVES, "expand_dims", JVP_VJP, program, batch_size=batch_size)
    assert endpoints.counts == {"vjp": wanted}


# The shapes of x, y, s, and of the tangents of x and y or the cotangent.
SHAPES = {
    "expand_dims": (((4, 3), (1, 3), (1,), (4, 3), (1, 3)), ((4, 3), (4, 3), (1,), (4, 3))),
    "broadcast_all": (((4, 3), (4, 3), (4,), (4, 3), (4, 3)), ((4, 3), (4, 3), (4,), (4, 3))),
    "legacy_vectorized": (((4, 3), (3,), (), (4, 3), (3,)), ((4, 3), (4, 3), (), (4, 3))),
}


@every_vectorised
def test_a_tangent_leads_like_its_argument_and_a_needed_argument_with_the_batch(method):
    """An unmapped argument leads as the method says, unless its cotangent is needed: that has the batch's size."""
    forward, reverse = SHAPES[method]
    pushed = calls(
        WAVES, method, JVP_VJP, under_jit(lambda f: jax.jvp(lambda x, y: by_x(f)(x, y, S), (XS, Y), (XS, Y))[1])
    )
    assert pushed.logs["jvp"].given == [forward]
    pulled = calls(
        WAVES, method, JVP_VJP, under_jit(lambda f: jax.grad(lambda x, y: by_x(f)(x, y, S)["all"].sum(), (0, 1))(XS, Y))
    )
    assert pulled.logs["vjp"].given == [reverse]


LED_BY_EACH_OTHER = {
    "expand_dims": ((4, 3), (4, 3), (1,), (4, 3), (4, 3)),
    "broadcast_all": ((4, 3), (4, 3), (4,), (4, 3), (4, 3)),
    "legacy_vectorized": ((4, 3), (4, 3), (), (4, 3), (4, 3)),
}


@every_vectorised
@pytest.mark.parametrize("mapped", ["argument", "tangent"])
def test_an_argument_and_its_tangent_lead_alike_whichever_is_mapped(method, mapped):
    def program(f):
        def pushed(x, y):
            arguments = (X, y) if mapped == "tangent" else (x, y)
            tangents = (x, Y) if mapped == "tangent" else (X, Y)
            return jax.jvp(lambda x, y: f(x, y, S), arguments, tangents)[1]

        return jax.vmap(pushed)(XS, YS)

    assert calls(WAVES, method, JVP_VJP, under_jit(program)).logs["jvp"].given == [LED_BY_EACH_OTHER[method]]


# --- what is asked for ----------------------------------------------------------------------------------------

ASKED = {
    "one argument": (
        lambda f: jax.grad(lambda y: summed(f)(X, y, S))(Y),
        ("vjp", (ALL_OUT, (F, T, F))),
    ),
    "one output": (
        lambda f: jax.grad(lambda *args: f(*args)["x"], (0, 2))(X, Y, S),
        ("vjp", ({"all": F, "y": F, "x": T}, (T, F, T))),
    ),
    "one gradient in use": (
        lambda f: jax.grad(summed(f), (0, 1, 2))(X, Y, S)[2],
        ("vjp", (ALL_OUT, (F, F, T))),
    ),
    "one gradient of a batch in use": (
        lambda f: by_x(jax.grad(lambda *args: f(*args)["y"].sum(), (0, 1, 2)))(XS, Y, S)[1],
        ("vjp", ({"all": F, "y": T, "x": F}, (F, T, F))),
    ),
    "one tangent": (
        lambda f: jax.jvp(lambda y: f(X, y, S), (Y,), (X,))[1],
        ("jvp", (F, T, F)),
    ),
    "a tangent that is known to be zero": (
        lambda f: jax.jvp(lambda x, s: f(jax.lax.stop_gradient(x), Y, s), (X, S), (X, S))[1],
        ("jvp", (F, F, T)),
    ),
    "one output of a linearized function": (
        lambda f: jax.linear_transpose(lambda t: jax.jvp(lambda x: f(x, Y, S), (X,), (t,))[1]["y"], X)(Y)[0],
        ("vjp", ({"all": F, "y": T, "x": F}, (T, F, F))),
    ),
    "in a scan": (
        lambda f: jax.grad(
            lambda s: jax.lax.scan(lambda c, x: (c + f(x, Y, s)["x"], None), 0.0, XS[:1])[0]
        )(S),
        ("vjp", ({"all": F, "y": F, "x": T}, (F, F, T))),
    ),
    "in remat": (
        lambda f: jax.grad(jax.checkpoint(lambda s: f(X, Y, s)["all"].sum()))(S),
        ("vjp", ({"all": T, "y": F, "x": F}, (F, F, T))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_an_endpoint_is_asked_for_what_is_used(name):
    program, wanted = ASKED[name]
    assert calls(WAVES, "expand_dims", JVP_VJP, under_jit(program)).asked == [wanted]


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_gradient_of_a_batch_is_used(used, method):
    """Each element has a gradient of its own in x; those in y and s are sums over the batch."""

    def gradient(f):
        return jax.grad(summed(by_x(f)), (0, 1, 2))(XS, Y, S)[used]

    endpoints = calls(WAVES, method, JVP_VJP, lambda f: assert_close(under_jit(gradient)(f), gradient(WAVES.twin)))
    assert {needed for _, (_, needed) in endpoints.asked} == {tuple(i == used for i in range(3))}


def test_a_jacobian_is_asked_for_the_arguments_in_use():
    endpoints = calls(
        WAVES,
        "sequential",
        ("jacobian",),
        under_jit(lambda f: [row[0] for row in jax.jacfwd(f, (0, 2))(X, Y, S).values()]),
    )
    assert [what for name, what in endpoints.asked] == [(T, F, T)]
    endpoints = calls(
        WAVES, "sequential", ("jacobian",), under_jit(lambda f: [row[1] for row in jax.jacrev(f, (0, 1))(X, Y, S)["y"]])
    )
    assert [what for name, what in endpoints.asked] == [(T, T, F)]


UNUSED = {
    "tangents": lambda f: jax.jvp(f, (X, Y, S), (X, Y, S))[0]["all"],
    "cotangents": lambda f: jax.vjp(f, X, Y, S)[0]["all"],
    "gradient": lambda f: jax.value_and_grad(summed(f))(X, Y, S)[0],
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_derivative_that_is_not_used_makes_no_call(name):
    assert calls(WAVES, "sequential", JVP_VJP, under_jit(UNUSED[name])).counts == {"call": 1}


def test_equal_derivatives_are_one_call():
    program = under_jit(lambda f: jax.grad(summed(f))(X, Y, S) + jax.grad(summed(f))(X, Y, S))
    assert calls(WAVES, "sequential", JVP_VJP, program).counts == {"vjp": 1}


@pytest.mark.parametrize("name", ["grad of vmap", "vmap of jvp"])
def test_pass_outputs_makes_the_call(name):
    program = {
        "grad of vmap": lambda f: jax.grad(summed(jax.vmap(f, (0, None))))(XS, S),
        "vmap of jvp": lambda f: jax.vmap(lambda t: jax.jvp(lambda p: f(p, S), (X,), (t,))[1])(XS),
    }[name]
    endpoint = "vjp" if name == "grad of vmap" else "jvp"
    assert calls(ROOTS, "expand_dims", JVP_VJP, under_jit(program)).counts == {endpoint: 1}
    passed = calls(ROOTS, "expand_dims", JVP_VJP, under_jit(program), pass_outputs=True)
    assert passed.counts == {"call": 1, endpoint: 1}
