"""What a host call says when it cannot be differentiated, or its endpoints answer wrongly; and when it says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import XS, YS, X, Y, assert_close

import batchrules
from batchrules import ArraySpec

ways = pytest.mark.parametrize("run", [jax.jit, lambda program: program], ids=["jit", "eager"])


def times_jvp(args, tangents):
    tx, ty = (0.0 if t is None else t for t in tangents)
    return tx * args[1] + args[0] * ty


def times_vjp(args, cotangent, needed):
    return cotangent * args[1] if needed[0] else None, cotangent * args[0] if needed[1] else None


def times_blocks(args, needed):
    return np.diag(args[1]) if needed[0] else None, np.diag(args[0]) if needed[1] else None


def times(method="broadcast_all", **endpoints):
    return batchrules.host_call(lambda x, y: x * y, lambda x, y: x, method=method, name="times", **endpoints)  # noqa: ARG005


def loss(f):
    return lambda x, y: f(x, y).sum()


# --- missing endpoints ----------------------------------------------------------------------------------------


@ways
def test_only_a_vjp(run):
    """JAX traces a jvp on its way to a vjp: that there is none must not matter."""
    f = times(vjp=times_vjp)
    gradient = run(jax.grad(lambda x, y: jax.vmap(f, (0, None))(x, y).sum(), (0, 1)))
    assert_close(gradient(XS, Y), (jnp.broadcast_to(Y, (4, 3)), XS.sum(0)))
    assert_close(run(jax.jacrev(f))(X, Y), jnp.diag(Y))
    with pytest.raises(batchrules.DerivativeError, match=r"'?times'? has a vjp but no jvp endpoint.*Pass jvp="):
        run(lambda x, y: jax.jvp(f, (x, y), (y, x)))(X, Y)


@ways
def test_only_a_jvp(run):
    f = times(jvp=times_jvp)
    assert_close(run(lambda x, y: jax.jvp(f, (x, y), (y, x))[1])(X, Y), Y * Y + X * X)
    assert_close(run(jax.vmap(jax.jacfwd(f, 1), (0, None)))(XS, Y), jax.vmap(jnp.diag)(XS))
    with pytest.raises(batchrules.DerivativeError, match=r"'?times'? has a jvp but no vjp endpoint.*Pass vjp="):
        run(jax.grad(loss(f)))(X, Y)


SECOND_DERIVATIVES = {
    "hessian": (jax.hessian, "vjp", "jvp"),
    "jacfwd of jacfwd": (lambda f: jax.jacfwd(jax.jacfwd(f)), "jvp", "jvp"),
    "jacrev of jacrev": (lambda f: jax.jacrev(jax.jacrev(f)), "vjp", "vjp"),
}


@ways
@pytest.mark.parametrize(("transform", "kind", "which"), SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)
@pytest.mark.parametrize("by", ["the jacobian endpoint", "finite differences"])
def test_what_gives_first_derivatives_only(by, transform, kind, which, run):
    """The advice is not to give what is given already."""

    def cube(x):
        return x**3

    differences = batchrules.finite_difference(cube)
    given = {"jacobian": lambda args, _: (3 * args[0] ** 2,)} if by == "the jacobian endpoint" else differences
    f = batchrules.host_call(cube, jax.ShapeDtypeStruct((), "float64"), **given)
    text = rf"'cube' \({kind}\) is made by {by}, for first.*{which}\. Pass {kind}= that is a host_call with a {which}="
    with pytest.raises(batchrules.DerivativeError, match=text):
        run(transform(f))(2.0)


def test_the_advice_for_second_derivatives_helps():
    def vjp(args, cotangent, needed):
        del needed
        return (3 * cotangent * args[0] ** 2,)

    def vjp_jvp(args, tangents):
        (x,), cotangent, _ = args
        (tx,), tangent, _ = tangents
        return (sum(part for part in (6 * cotangent * x * tx, 0 if tangent is None else 3 * tangent * x**2)),)

    endpoint = batchrules.host_call(vjp, lambda args, cotangent, needed: (args[0],), jvp=vjp_jvp)  # noqa: ARG005
    f = batchrules.host_call(
        lambda x: x**3,
        jax.ShapeDtypeStruct((), "float64"),
        jacobian=lambda args, _: (3 * args[0] ** 2,),
        vjp=endpoint,
    )
    np.testing.assert_allclose(jax.hessian(f)(2.0), 12.0)


def test_a_missing_endpoint_is_reported_when_lowered_and_not_when_traced():
    reverse, forward = times(vjp=times_vjp), times(jvp=times_jvp)
    traced = jax.jit(lambda x, y: jax.jvp(reverse, (x, y), (y, x))).trace(X, Y)
    with pytest.raises(batchrules.DerivativeError, match="no jvp endpoint"):
        traced.lower()
    gradient = jax.jit(jax.grad(loss(forward))).trace(X, Y)
    with pytest.raises(batchrules.DerivativeError, match="no vjp endpoint"):
        gradient.lower()
    jax.jit(jax.grad(loss(reverse))).trace(X, Y).lower()
    jax.make_jaxpr(lambda x, y: jax.jvp(reverse, (x, y), (y, x)))(X, Y)


def test_a_missing_endpoint_does_not_matter_where_its_derivative_is_not_used():
    f = times(vjp=times_vjp)
    assert_close(jax.jit(lambda x, y: jax.jvp(f, (x, y), (y, x))[0])(X, Y), X * Y)


TRACED = {
    "jvp": lambda f: lambda x, y: jax.jvp(f, (x, y), (y, x)),
    "grad": lambda f: jax.grad(loss(f)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(loss(f))),
}


@pytest.mark.parametrize("name", TRACED)
def test_without_any_endpoint_tracing_is_an_error(name):
    args = (XS, YS) if name == "vmap of grad" else (X, Y)
    with pytest.raises(batchrules.DerivativeError, match=r"times.*(jvp|vjp|jacobian)"):
        jax.make_jaxpr(TRACED[name](times()))(*args)


def test_without_any_endpoint_what_is_constant_may_be_differentiated_around():
    f = times()
    assert_close(jax.grad(lambda x, y: (jax.lax.stop_gradient(f(y, y)) * x).sum())(X, Y), Y * Y)
    assert_close(jax.jit(jax.grad(lambda x: (f(Y, Y) * x).sum()))(X), Y * Y)


def test_a_jacobian_serves_both_modes():
    f = times("sequential", jacobian=times_blocks)
    assert_close(jax.jvp(f, (X, Y), (Y, X))[1], Y * Y + X * X)
    assert_close(jax.grad(loss(f), (0, 1))(X, Y), (Y, X))


@pytest.mark.parametrize("name", ["jvp", "vjp", "jacobian"])
def test_an_endpoint_that_cannot_be_called(name):
    with pytest.raises(TypeError, match=name):
        times(**{name: 3})


@pytest.mark.parametrize("name", ["jvp", "vjp", "jacobian"])
def test_outputs_that_are_passed_to_an_endpoint_and_to_its_own(name):
    """Its own endpoints would be given either outputs, the call's or the endpoint's."""
    endpoint = batchrules.host_call(np.cos, lambda x: x, pass_outputs=True, jvp=times_jvp)
    with pytest.raises(ValueError, match=f"pass_outputs=True, and so has the {name} endpoint"):
        batchrules.host_call(np.sin, lambda x: x, pass_outputs=True, **{name: endpoint})
    batchrules.host_call(np.sin, lambda x: x, **{name: endpoint})
    batchrules.host_call(np.sin, lambda x: x, pass_outputs=True, **{name: endpoint.replace(pass_outputs=False)})


def test_arrays_by_keyword_stand_at_their_place():
    f = times(jvp=times_jvp, vjp=times_vjp)
    assert_close(jax.grad(lambda x, y: f(y=y, x=x).sum(), (0, 1))(X, Y), (Y, X))
    assert_close(jax.jit(lambda x, y: jax.jvp(lambda x, y: f(x, y=y), (x, y), (y, x))[1])(X, Y), Y * Y + X * X)


def test_arrays_by_keyword_are_an_error_where_the_parameter_has_no_position():
    def scaled(x, *, y):
        return x * y

    f = batchrules.host_call(scaled, lambda x, y: x, vjp=times_vjp)  # noqa: ARG005
    with pytest.raises(TypeError, match=r"must be positional parameters"):
        jax.grad(lambda x: f(x, y=Y).sum())(X)


# --- arguments and outputs that are declared to have no derivative ----------------------------------------------


def declared(**options):
    def forward(x, table):
        return {"value": x * table, "steps": x + 0.0}

    def vjp(args, cotangents, needed):
        assert needed[1] is not True
        value = cotangents["value"]
        return (0.0 * args[0] if value is None else value * args[1], None)

    def jvp(args, tangents):
        return {"value": tangents[0] * args[1], "steps": None}

    shapes = {"value": ArraySpec((3,), "float64"), "steps": ArraySpec((3,), "float64", differentiable=False)}
    schema = {"x": ArraySpec((..., 3)), "table": ArraySpec((..., 3), differentiable=False)}
    options = {"method": "broadcast_all", "schema": schema, **options}
    return batchrules.host_call(forward, shapes, name="declared", vjp=vjp, jvp=jvp, **options)


WAYS_OUT = r"(?s)(?=.*[Cc]lose over)(?=.*argnums)(?=.*stop_gradient)"


@ways
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap of grad"])
def test_an_argument_without_derivative_is_an_error_that_names_it_and_the_ways_out(name, run):
    f = declared()
    program = {
        "grad": lambda: jax.grad(lambda x, t: f(x, t)["value"].sum(), 1)(X, Y),
        "jvp": lambda: jax.jvp(f, (X, Y), (X, Y)),
        "vmap of grad": lambda: jax.vmap(jax.grad(lambda x, t: f(x, t)["value"].sum(), (0, 1)))(XS, YS),
    }[name]
    with pytest.raises(batchrules.DerivativeError, match=WAYS_OUT + ".*table"):
        run(program)()


@ways
def test_the_three_ways_out_of_an_argument_without_derivative(run):
    f = declared()
    for gradient in (
        lambda x, t: jax.grad(lambda x: f(x, t)["value"].sum())(x),
        jax.grad(lambda x, t: f(x, t)["value"].sum()),
        lambda x, t: jax.grad(lambda x, t: f(x, jax.lax.stop_gradient(t))["value"].sum(), (0, 1))(x, t)[0],
    ):
        assert_close(run(gradient)(X, Y), Y)
    assert_close(run(lambda x, t: jax.jvp(lambda x: f(x, t)["value"], (x,), (Y,))[1])(X, Y), Y * Y)


@pytest.mark.parametrize("name", ["grad", "vjp", "jvp in jit", "vmap of grad in jit"])
def test_an_output_without_derivative_is_an_error_that_names_it_and_the_ways_out(name):
    f = declared()
    program = {
        "grad": lambda: jax.grad(lambda x: (f(x, Y)["steps"] + f(x, Y)["value"]).sum())(X),
        "vjp": lambda: jax.vjp(lambda x: f(x, Y), X)[1]({"value": Y, "steps": Y}),
        "jvp in jit": lambda: jax.jit(lambda x: jax.jvp(lambda x: f(x, Y), (x,), (x,))[1])(X),
        "vmap of grad in jit": lambda: jax.jit(jax.vmap(jax.grad(lambda x: f(x, Y)["steps"].sum())))(XS),
    }[name]
    with pytest.raises(batchrules.DerivativeError, match=WAYS_OUT + ".*steps"):
        program()


@ways
def test_an_output_without_derivative_that_is_not_differentiated(run):
    f = declared()
    value, gradient = run(jax.value_and_grad(lambda x: f(x, Y)["value"].sum()))(X)
    assert_close((value, gradient), ((X * Y).sum(), Y))
    stopped = run(jax.grad(lambda x: (f(x, Y)["value"] * jax.lax.stop_gradient(f(x, Y)["steps"])).sum()))
    assert_close(stopped(X), Y * X)
    aux = run(jax.grad(lambda x: (f(x, Y)["value"].sum(), f(x, Y)["steps"]), has_aux=True))
    assert_close(aux(X), (Y, X))
    assert_close(run(lambda x: jax.jvp(lambda x: f(x, Y)["value"], (x,), (Y,))[1])(X), Y * Y)


def test_the_tangent_of_an_output_without_derivative_is_nan_outside_jit():
    tangents = jax.jvp(lambda x: declared()(x, Y), (X,), (Y,))[1]
    assert_close(tangents["value"], Y * Y)
    assert np.isnan(tangents["steps"]).all()


# --- answers of the wrong form --------------------------------------------------------------------------------

TANGENTS = {
    "too short": (lambda x: x[:2], r"(?s)times.*jvp.*tangent.*\(2,\).*\(3,\)"),
    "dtype": (lambda x: x.astype("float32"), r"(?s)times.*jvp.*float32"),
    "tuple": (lambda x: (x, x), "(?s)times.*jvp endpoint must return a tree like the outputs"),
}
COTANGENTS = {
    "too short": (lambda c: (c, c[:1]), r"(?s)times.*vjp.*cotangent of y.*\(1,\).*\(3,\)"),
    "dtype": (lambda c: (c, c.astype("float32")), "(?s)times.*vjp.*float32"),
    "one of two": (lambda c: (c,), "(?s)times.*vjp endpoint must return a tree like the arguments"),
    "no tuple": (lambda c: c, "(?s)times.*vjp endpoint must return a tree like the arguments"),
}
BLOCKS = {
    "one of two": (lambda x: (np.diag(x),), "(?s)times.*jacobian endpoint must return a tree like"),
    "not square": (lambda x: (np.diag(x)[:2], np.diag(x)), "(?s)times.*jacobian.*3, ?3"),
    "dtype": (lambda x: (np.diag(x).astype("float32"), np.diag(x)), "(?s)times.*jacobian.*float32"),
}


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
@pytest.mark.parametrize(("answer", "text"), TANGENTS.values(), ids=TANGENTS)
def test_tangents_of_the_wrong_form(answer, text, method):
    f = times(method, jvp=lambda args, _: answer(args[0]))
    with pytest.raises(batchrules.ResultError, match=text):
        jax.jvp(f, (X, Y), (X, Y))


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
@pytest.mark.parametrize(("answer", "text"), COTANGENTS.values(), ids=COTANGENTS)
def test_cotangents_of_the_wrong_form(answer, text, method):
    f = times(method, vjp=lambda _, cotangent, __: answer(cotangent))
    with pytest.raises(batchrules.ResultError, match=text):
        jax.grad(loss(f), (0, 1))(X, Y)


@pytest.mark.parametrize(("answer", "text"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_the_wrong_form(answer, text):
    f = times("sequential", jacobian=lambda args, _: answer(args[0]))
    with pytest.raises(batchrules.ResultError, match=text):
        jax.grad(loss(f), (0, 1))(X, Y)


@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all", "legacy_vectorized"])
@pytest.mark.parametrize("endpoint", ["jvp", "vjp"])
def test_a_batch_of_the_wrong_size(endpoint, method):
    """An endpoint that sums over the batch itself is told so, and is not believed."""
    f = times(
        method,
        jvp=lambda args, tangents: tangents[0].sum(0) * args[1],
        vjp=lambda args, c, _: (c * args[1], (c * args[0]).sum(0)),
    )
    program = {
        "jvp": lambda: jax.jvp(lambda x: jax.vmap(f, (0, None))(x, Y), (XS,), (XS,)),
        "vjp": lambda: jax.grad(lambda x, y: jax.vmap(f, (0, None))(x, y).sum(), (0, 1))(XS, Y),
    }[endpoint]
    with pytest.raises(batchrules.BatchContractError, match=f"(?s)times.*{endpoint}"):
        program()


def test_none_means_zero():
    f = times("sequential", jvp=lambda *_: None, vjp=lambda *_: (None, None), jacobian=lambda *_: (None, None))
    zeros = jnp.zeros(3)
    assert_close(jax.jvp(f, (X, Y), (Y, X)), (X * Y, zeros))
    assert_close(jax.jit(jax.vmap(jax.grad(loss(f), (0, 1))))(XS, YS), (XS * 0, YS * 0))
