"""Derivatives of device calls under every composition, through the body and by endpoints, against a pure-JAX twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import FORWARD, REVERSE, SECOND, SS, XS, YS, S, X, Y, assert_close, total
from foreign import METHODS, Foreign
from jax.test_util import check_grads

import batchrules

DERIVATIONS = ("body", "endpoints")
both = pytest.mark.parametrize("derivation", DERIVATIONS)
every_method = pytest.mark.parametrize("method", METHODS)


def _smooth(xp, x, y, s):
    scale = s[..., None]
    mixed = xp.sin(x) * y * y * scale + xp.sum(x * y, axis=-1, keepdims=True) * xp.cos(y)
    return {"all": mixed, "y": y**3 + 2 * y, "x": xp.exp(-xp.sum(x * x, axis=-1))}


SMOOTH = Foreign("smooth", _smooth, ((3,), (3,), ()))


def jvp_of(function):
    """A jvp endpoint that differentiates the function by JAX."""

    def jvp(args, tangents):
        filled = [jnp.zeros_like(a) if t is None else t for a, t in zip(args, tangents, strict=True)]
        return jax.jvp(function, args, tuple(filled))[1]

    return jvp


def vjp_of(function):
    """A vjp endpoint that differentiates the function by JAX."""

    def vjp(args, cotangents, needed):
        def flat(*moving):
            outputs = jax.tree.leaves(function(*moving))
            return [o if c is None else jnp.broadcast_to(o, c.shape) for o, c in zip(outputs, given, strict=True)]

        given = jax.tree.leaves(cotangents, is_leaf=lambda leaf: leaf is None)
        outputs, pull = jax.vjp(flat, *args)
        answer = pull([jnp.zeros_like(o) if c is None else c for o, c in zip(outputs, given, strict=True)])
        return tuple(a if wanted else None for a, wanted in zip(answer, needed, strict=True))

    return vjp


def device(foreign, method, derivation, **options):
    def function(*args):
        return foreign(jnp, *args)

    endpoints = {"jvp": jvp_of(function), "vjp": vjp_of(function)} if derivation == "endpoints" else {}
    return batchrules.device_call(function, method=method, name=foreign.name, **endpoints, **options)


COMPOSITIONS = {**FORWARD, **REVERSE, **SECOND}


@pytest.fixture(scope="module")
def twin_results():
    """The twin's result for each composition, worked out once."""
    return {name: jax.jit(lambda c=c: c(SMOOTH.twin))() for name, c in COMPOSITIONS.items()}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition(name, twin_results):
    f = device(SMOOTH, "expand_dims", "body")
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f))(), twin_results[name])


LOOPED = (
    "linear_transpose",
    "hessian",
    "jacrev of nested vmaps",
    "vmap of grad of vmap",
    "vmap of grad of scan",
    "grad of remat of vmap",
)


@pytest.mark.parametrize("name", list(dict.fromkeys([*SECOND, *list(COMPOSITIONS)[::2]])))
def test_composition_of_endpoints(name, twin_results):
    f = device(SMOOTH, "broadcast_all", "endpoints")
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f))(), twin_results[name])


@pytest.mark.parametrize("name", LOOPED)
def test_composition_of_a_loop(name, twin_results):
    f = device(SMOOTH, "sequential", "endpoints")
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f))(), twin_results[name])


@both
@every_method
@pytest.mark.parametrize("name", ["vmap of grad", "grad of vmap"])
def test_every_method(name, method, derivation, twin_results):
    f = device(SMOOTH, method, derivation)
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f))(), twin_results[name])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
@pytest.mark.parametrize("name", ["grad of nested vmaps"])
def test_batch_size(name, method, batch_size, twin_results):
    f = device(SMOOTH, method, "body", batch_size=batch_size)
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f))(), twin_results[name])


@both
@pytest.mark.parametrize("name", ["jacfwd", "jacrev", "grad of vmap", "linear_transpose of vmap"])
def test_outside_jit(name, derivation, twin_results):
    assert_close(COMPOSITIONS[name](device(SMOOTH, "broadcast_all", derivation)), twin_results[name])


@both
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_auto_is_right_whatever_it_chooses(method, derivation, twin_results):
    signature = "(i),(i),()->(i),(),(i)" if method == "expand_dims" else None
    f = device(SMOOTH, "auto", derivation, signature=signature)
    assert f.method_for(XS, YS, SS).method == method
    assert_close(jax.jit(lambda: COMPOSITIONS["vmap of grad"](f))(), twin_results["vmap of grad"])


@pytest.mark.parametrize(("modes", "derivation"), [("fwd", "endpoints"), ("rev", "body")])
def test_numerical_derivatives(modes, derivation):
    """Against finite differences, second derivatives too."""
    f = device(SMOOTH, "expand_dims", derivation)
    check_grads(jax.jit(jax.vmap(f, (0, None, None))), (XS[:2], Y, S), order=2, modes=[modes])


def _discrete(xp, x, y):
    return {"rank": xp.argmax(x * y, axis=-1).astype("int32"), "positive": x > y, "product": x * y * y}


TWO_KINDS = Foreign("two_kinds", _discrete, ((3,), (3,)))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "legacy_vectorized"])
def test_integer_and_boolean_outputs_have_float0_tangents(method):
    f = device(TWO_KINDS, method, "body")

    def tangents(f):
        return jax.jvp(jax.vmap(f, (0, None)), (XS, Y), (YS, X))[1]

    result, wanted = tangents(f), tangents(TWO_KINDS.twin)
    assert [leaf.dtype for leaf in jax.tree.leaves(result)] == [leaf.dtype for leaf in jax.tree.leaves(wanted)]
    assert_close(result["product"], wanted["product"])


@both
@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_gradient_where_other_outputs_are_integers(method, derivation):
    f = device(TWO_KINDS, method, derivation) if derivation == "body" else with_integer_outputs_by_hand(method)

    def gradient(f):
        return jax.jit(jax.grad(lambda x, y: jnp.sin(jax.vmap(f, (0, None))(x, y)["product"]).sum(), (0, 1)))(XS, Y)

    assert_close(gradient(f), gradient(TWO_KINDS.twin))


def with_integer_outputs_by_hand(method):
    def vjp(args, cotangents, needed):
        x, y = args
        assert cotangents["rank"] is None
        assert cotangents["positive"] is None
        given = cotangents["product"]
        return given * y * y if needed[0] else None, 2 * given * x * y if needed[1] else None

    return batchrules.device_call(lambda x, y: TWO_KINDS(jnp, x, y), method=method, vjp=vjp)


def _gather(xp, x, index, scale):
    taken = xp.take_along_axis(x, index, axis=-1)
    return taken * taken * scale[..., None]


GATHER = Foreign("gather", _gather, ((3,), (2,), ()))


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, 0), (0, 0, None)], ids=str)
@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_integer_arguments(method, in_axes):
    index = jnp.array([[0, 2], [1, 1], [2, 0], [2, 2]])
    args = [XS, index, SS]
    args = [x if axis == 0 else x[0] for x, axis in zip(args, in_axes, strict=True)]
    f = device(GATHER, method, "body")

    def gradient(f):
        return jax.jit(jax.grad(lambda *a: jnp.sin(jax.vmap(f, in_axes)(*a)).sum(), (0, 2)))(*args)

    assert_close(gradient(f), gradient(GATHER.twin))


@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd])
def test_integer_arguments_take_and_give_float0(transform):
    f = device(GATHER, "sequential", "body")
    index = jnp.array([0, 2])
    assert_close(transform(f)(X, index, S), transform(GATHER.twin)(X, index, S))
    primals, pull = jax.vjp(f, X, index, S)
    assert pull(primals)[1].dtype == jax.dtypes.float0
    zero = np.zeros(2, jax.dtypes.float0)
    assert_close(jax.jvp(f, (X, index, S), (Y, zero, S)), jax.jvp(GATHER.twin, (X, index, S), (Y, zero, S)))


def _not_holomorphic(xp, z, r):
    return z * z * r.astype(z.dtype) + xp.conj(z)


COMPLEX = Foreign("complex", _not_holomorphic, ((3,), (3,)))


@both
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_complex_arguments_beside_real_ones(method, derivation):
    z = jax.lax.complex(XS, YS)
    f = device(COMPLEX, method, derivation)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return (
            jax.jvp(g, (z, X), (z * 2j, Y)),
            jax.vjp(g, z, X)[1](z * 1j),
            jax.grad(lambda z, r: jnp.abs(g(z, r)).sum(), (0, 1))(z, X),
            jax.vmap(jax.grad(lambda z, r: jnp.imag(f(z, r)).sum(), (0, 1)), (0, None))(z, X),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(COMPLEX.twin))())


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "complex64"])
@pytest.mark.parametrize(("method", "derivation"), [("sequential", "body"), ("expand_dims", "endpoints")])
def test_dtypes(method, derivation, dtype):
    """Whole numbers, and sums of four of them, are exact in every dtype."""
    quadratic = Foreign("quadratic", lambda xp, x, y: x * y - y * y, ((3,), (3,)))  # noqa: ARG005
    x, y = (jnp.round(2 * a).astype(dtype) for a in (XS, Y))
    f = device(quadratic, method, derivation)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return (
            jax.jvp(g, (x, y), (x, y))[1],
            jax.vjp(g, x, y)[1](x),
            jax.jacrev(f, holomorphic=x.dtype.kind == "c")(x[0], y),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(quadratic.twin))(), 0, 0)


@jax.custom_vjp
def doubled_gradient(x, y):
    return x * y


doubled_gradient.defvjp(lambda x, y: (x * y, (x, y)), lambda kept, ct: (2 * ct * kept[1], 2 * ct * kept[0]))


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_custom_vjp_in_the_body(method):
    """JAX traces a jvp on its way to a vjp; there is none here."""
    f = batchrules.device_call(doubled_gradient, method=method)
    gradient = jax.grad(lambda x, y: jax.vmap(f)(x, y).sum(), (0, 1))
    assert_close(jax.jit(gradient)(XS, YS), (2 * YS, 2 * XS))
    assert_close(gradient(XS, YS), (2 * YS, 2 * XS))
    assert_close(jax.jit(jax.vmap(jax.grad(lambda x, y: f(x, y).sum())))(XS, YS), 2 * YS)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(f, (X, Y), (X, Y))


def test_custom_jvp_in_the_body():
    relu_like = jax.custom_jvp(lambda x: jnp.maximum(x, 0))
    relu_like.defjvp(lambda primals, tangents: (relu_like(*primals), 7 * tangents[0]))
    f = batchrules.device_call(relu_like, method="expand_dims")
    assert_close(jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum())))(XS), jnp.full_like(XS, 7))
    assert_close(jax.jit(jax.jacfwd(f))(X), 7 * jnp.eye(3))


def only(**endpoints):
    return batchrules.device_call(lambda x, y: x * y, method="broadcast_all", name="times", **endpoints)


def times_jvp(args, tangents):
    x, y = args
    parts = [
        p
        for p in (tangents[0] is not None and tangents[0] * y, tangents[1] is not None and x * tangents[1])
        if p is not False
    ]
    return sum(parts[1:], parts[0])


def times_vjp(args, cotangent, needed):
    x, y = args
    return cotangent * y if needed[0] else None, cotangent * x if needed[1] else None


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_only_a_vjp(jit):
    f = only(vjp=times_vjp)
    run = jax.jit if jit else lambda g: g
    assert_close(
        run(jax.grad(lambda x, y: jax.vmap(f, (0, None))(x, y).sum(), (0, 1)))(XS, Y),
        (jnp.broadcast_to(Y, (4, 3)), XS.sum(0)),
    )
    forward = run(lambda x, y: jax.jvp(f, (x, y), (y, x)))
    with pytest.raises(
        batchrules.DerivativeError, match=r"device_call 'times' has a vjp but no jvp endpoint.*Pass jvp="
    ):
        forward(X, Y)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_only_a_jvp(jit):
    f = only(jvp=times_jvp)
    run = jax.jit if jit else lambda g: g
    assert_close(run(lambda x, y: jax.jvp(f, (x, y), (y, x))[1])(X, Y), Y * Y + X * X)
    assert_close(run(jax.vmap(jax.jacfwd(f, 1), (0, None)))(XS, Y), jax.vmap(jnp.diag)(XS))
    reverse = run(jax.grad(lambda x, y: f(x, y).sum()))
    with pytest.raises(
        batchrules.DerivativeError, match=r"device_call 'times' has a jvp but no vjp endpoint.*Pass vjp="
    ):
        reverse(X, Y)


def test_a_missing_endpoint_is_reported_when_lowered_and_not_when_traced():
    f = only(vjp=times_vjp)
    traced = jax.jit(lambda x, y: jax.jvp(f, (x, y), (y, x))).trace(X, Y)
    with pytest.raises(batchrules.DerivativeError, match="no jvp endpoint"):
        traced.lower()
    jax.make_jaxpr(jax.grad(lambda x, y: only(jvp=times_jvp)(x, y).sum()))(X, Y)


def test_only_the_cotangents_that_are_needed_are_asked_for():
    asked = []

    def vjp(args, cotangent, needed):
        asked.append(needed)
        return times_vjp(args, cotangent, needed)

    f = only(vjp=vjp)
    jax.grad(lambda x, y: f(x, y).sum(), 1)(X, Y)
    jax.jit(jax.vmap(jax.grad(lambda x, y: f(x, y).sum(), 0), (0, None)))(XS, Y)
    assert set(asked) == {(False, True), (True, False)}


def test_endpoints_speak_in_trees():
    seen = {}

    def function(model, x, power):
        return {"y": model["w"] * x**power, "z": [model["b"] + x]}

    def jvp(args, tangents):
        seen["jvp"] = jax.tree.map(lambda leaf: leaf is not None, tangents, is_leaf=lambda leaf: leaf is None)
        _, x, power = args
        return {"y": tangents[0]["w"] * x**power, "z": [None]}

    def vjp(args, cotangents, needed):
        seen["vjp"] = needed, jax.tree.map(lambda leaf: leaf is not None, cotangents, is_leaf=lambda leaf: leaf is None)
        _, x, power = args
        return {"w": cotangents["y"] * x**power, "b": None}, None, None

    f = batchrules.device_call(function, method="sequential", static_argnames="power", jvp=jvp, vjp=vjp)
    model = {"w": X, "b": Y}
    push = jax.jvp(lambda w: f({"w": w, "b": Y}, X, 2), (X,), (Y,))[1]
    assert_close(push, {"y": Y * X**2, "z": [jnp.zeros(3)]})
    pull = jax.grad(lambda w: f({"w": w, "b": Y}, X, 2)["y"].sum())(X)
    assert_close(pull, X**2)
    assert seen["jvp"] == ({"w": True, "b": False}, False, False)
    assert seen["vjp"] == (({"w": True, "b": False}, False, None), {"y": True, "z": [False]})
    assert_close(jax.jit(jax.vmap(lambda x: f(model, x, 3)["y"]))(XS), X[None] * XS**3)


TANGENTS_OF_THE_WRONG_FORM = {
    "too short": (lambda x: x[:2], r"the jvp endpoint.*output 0 is float64\[2\], expected float64\[3\]"),
    "dtype": (lambda x: x.astype("float32"), r"the jvp endpoint.*output 0 is float32\[3\], expected float64\[3\]"),
    "tuple": (lambda x: (x, x), r"the jvp endpoint must return a tree like the outputs"),
}
COTANGENTS_OF_THE_WRONG_FORM = {
    "too short": (lambda ct: (ct, ct[:1]), r"the vjp endpoint.*argument 1 is float64\[1\], expected float64\[3\]"),
    "one of two": (lambda ct: (ct,), r"the vjp endpoint must return a tree like the arguments"),
}


@pytest.mark.parametrize(("answer", "text"), TANGENTS_OF_THE_WRONG_FORM.values(), ids=TANGENTS_OF_THE_WRONG_FORM)
def test_tangents_of_the_wrong_form(answer, text):
    f = only(jvp=lambda args, _: answer(args[0]))
    with pytest.raises(batchrules.ResultError, match=text):
        jax.jvp(f, (X, Y), (X, Y))


@pytest.mark.parametrize(("answer", "text"), COTANGENTS_OF_THE_WRONG_FORM.values(), ids=COTANGENTS_OF_THE_WRONG_FORM)
def test_cotangents_of_the_wrong_form(answer, text):
    f = only(vjp=lambda _, cotangent, __: answer(cotangent))
    with pytest.raises(batchrules.ResultError, match=text):
        jax.grad(lambda x, y: f(x, y).sum(), (0, 1))(X, Y)


@both
@every_method
def test_empty_batch(method, derivation):
    """No element: the cotangent of an unmapped argument is zero."""
    f = device(SMOOTH, method, derivation)
    gradient = jax.grad(total(jax.vmap(f, (0, None, None))), (0, 1, 2))
    assert_close(jax.jit(gradient)(XS[:0], Y, S), (XS[:0], jnp.zeros(3), jnp.zeros(())))
    per_element = jax.vmap(jax.grad(total(f), (0, 1)), (0, None, None))
    assert_close(per_element(XS[:0], Y, S), (XS[:0], XS[:0]))


@both
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_batch_of_one(method, derivation):
    f = device(SMOOTH, method, derivation)

    def derivatives(f):
        g = jax.vmap(f, (0, None, None))
        return jax.grad(total(g), (0, 1, 2))(XS[:1], Y, S), jax.jacfwd(g, 1)(XS[:1], Y, S)

    assert_close(jax.jit(lambda: derivatives(f))(), derivatives(SMOOTH.twin))
