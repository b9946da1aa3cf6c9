"""Endpoints of host calls speak in trees: containers, static arguments, None where there is nothing."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import XS, S, X, Y, assert_close
from host_endpoints import METHODS

import batchrules


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A container that only JAX knows."""

    w: Any
    b: Any
    kind: str = dataclasses.field(default="affine", metadata={"static": True})


def promise(model, x, power):
    del model, power
    return {"y": x, "z": [Pair(x, x)]}


def function(model, x, power):
    return {"y": model.w * x**power, "z": [Pair(model.b + x, model.w - x)]}


def twin(model, x, power):
    return {"y": model.w * x**power, "z": [Pair(model.b + x, model.w - x)]}


def zero(value):
    return 0.0 if value is None else value


def jvp(args, tangents):
    (model, x, power), (moved, dx, nothing) = args, tangents
    assert nothing is None
    dw, db, dx = map(zero, (moved.w, moved.b, dx))
    slope = power * x ** (power - 1)
    whole = np.zeros_like(model.w * x)
    return {"y": dw * x**power + model.w * slope * dx, "z": [Pair(whole + db + dx, whole + dw - dx)]}


def vjp(args, cotangents, needed):
    (model, x, power), (like, by_x, nothing) = args, needed
    assert nothing is None
    y, first, second = (zero(c) for c in (cotangents["y"], *cotangents["z"][0]))
    whole = np.zeros_like(model.w * x)
    to_x = whole + y * model.w * power * x ** (power - 1) + first - second if by_x else None
    to_model = Model(whole + y * x**power + second if like.w else None, whole + first if like.b else None)
    return to_model, to_x, None


def jacobian(args, needed):
    (model, x, power), (like, by_x, _) = args, needed
    eye = np.eye(3) * np.ones_like(model.w * x)[..., None]

    def row(w, b, dx):
        return Model(eye * w if like.w else None, eye * b if like.b else None), eye * dx if by_x else None, None

    return {
        "y": row((x**power)[..., None], 0.0, (model.w * power * x ** (power - 1))[..., None]),
        "z": [Pair(row(0.0, 1.0, 1.0), row(1.0, 0.0, -1.0))],
    }


ENDPOINTS = {"jvp, vjp": {"jvp": jvp, "vjp": vjp}, "jacobian": {"jacobian": jacobian}}
MODEL = Model(X, Y)


@pytest.mark.parametrize("endpoints", ENDPOINTS.values(), ids=ENDPOINTS)
@pytest.mark.parametrize("method", METHODS)
def test_containers_and_static_arguments(method, endpoints):
    f = batchrules.host_call(function, promise, method=method, static_argnames="power", **endpoints)

    def derivatives(f):
        g = jax.vmap(lambda m, x: f(m, x, 3), (None, 0))
        outputs, pull = jax.vjp(g, MODEL, XS)
        return (
            pull(jax.tree.map(jnp.sin, outputs)),
            jax.jvp(g, (MODEL, XS), (Model(Y, X), XS)),
            jax.jvp(lambda b: g(Model(X, b), XS), (Y,), (X,)),
            jax.grad(lambda m: f(m, X, 2)["z"][0].second.sum())(MODEL),
            jax.jacrev(lambda m, x: f(m, x, 2)["z"], (0, 1))(MODEL, X),
            jax.jacfwd(lambda m, x: f(m, x, power=2)["y"], (0, 1))(MODEL, X),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(twin))())
    assert_close(derivatives(f), derivatives(twin))


def test_what_an_endpoint_is_asked_for_looks_like_the_arguments():
    seen = {}

    def asked(name, endpoint):
        def noted(*args):
            seen[name] = args[1:]
            return endpoint(*args)

        return noted

    f = batchrules.host_call(
        function,
        promise,
        method="sequential",
        static_argnames="power",
        verify=False,
        jvp=asked("jvp", jvp),
        vjp=asked("vjp", vjp),
    )
    jax.jvp(lambda b: f(Model(X, b), X, 2), (Y,), (X,))
    model, *others = seen["jvp"][0]
    assert (model.w, model.kind, *others) == (None, "affine", None, None)
    np.testing.assert_array_equal(model.b, X)
    jax.jit(jax.grad(lambda w: f(Model(w, Y), X, 2)["z"][0].second.sum()))(X)
    cotangents, (model, *others) = seen["vjp"]
    assert (model.w, model.b, model.kind, *others) == (True, False, "affine", False, None)
    assert cotangents["y"] is None
    assert cotangents["z"][0].first is None
    np.testing.assert_array_equal(cotangents["z"][0].second, np.ones(3))


def test_static_arguments_stand_at_their_place():
    """Between arrays, and with a default value that the caller leaves out."""

    def scaled(x, mode, y, scale=2.0):
        assert mode == "double"
        return x * y * scale

    def pull(args, cotangent, needed):
        x, mode, y, *rest = args
        assert (mode, needed[1]) == ("double", None)
        scale = rest[0] if rest else 2.0
        return (cotangent * y * scale, None, cotangent * x * scale, *(None for _ in rest))

    f = batchrules.host_call(scaled, lambda x, *_, **__: x, static_argnames=("mode", "scale"), vjp=pull)
    assert_close(jax.grad(lambda x, y: f(x, "double", y).sum(), (0, 1))(X, Y), (2 * Y, 2 * X))
    assert_close(jax.jit(jax.grad(lambda x, y: f(x, "double", y, 3.0).sum(), (0, 1)))(X, Y), (3 * Y, 3 * X))
    assert_close(jax.grad(lambda x, y: f(x, y=y, mode="double").sum())(X, Y), 2 * Y)


def test_any_number_of_arguments():
    def product(*factors):
        return np.prod(factors, axis=0)

    def pull(args, cotangent, needed):
        assert len(args) == len(needed)
        return tuple(cotangent * np.prod(args, axis=0) / x for x in args)

    f = batchrules.host_call(product, lambda *factors: factors[0], vjp=pull)
    for count in (1, 2, 3):
        factors = [X + k for k in range(count)]
        wanted = jax.grad(lambda fs: jnp.prod(jnp.stack(fs), axis=0).sum())(factors)
        assert_close(jax.grad(lambda fs: f(*fs).sum())(factors), wanted)


def test_no_arguments_and_no_outputs():
    constant = batchrules.host_call(lambda: np.ones(3), jax.ShapeDtypeStruct((3,), "float64"), vjp=lambda *_: ())
    assert_close(jax.grad(lambda s: (s * constant()).sum())(S), jnp.array(3.0))
    nothing = batchrules.host_call(lambda x: {}, {}, vjp=lambda *_: (None,))  # noqa: ARG005
    assert_close(jax.grad(lambda x: (len(nothing(x)) + x).sum())(X), jnp.ones(3))
