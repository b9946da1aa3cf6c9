"""Derivatives of device calls under every composition, through the body and by endpoints, against a pure-JAX twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import METHODS, Foreign
from jax.test_util import check_grads

import batchrules

RNG = np.random.default_rng(0)
XS, YS = (jnp.asarray(RNG.normal(size=(4, 3))) for _ in range(2))
SS = jnp.asarray(RNG.normal(size=(4,)))
X, Y, S = XS[0], YS[1], SS[2]
DERIVATIONS = ("body", "endpoints")
both = pytest.mark.parametrize("derivation", DERIVATIONS)
every_method = pytest.mark.parametrize("method", METHODS)
# A loop, one call that tells what depends on what, and one that does not.
WAYS = [("sequential", "endpoints"), ("expand_dims", "body"), ("broadcast_all", "endpoints")]


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


def total(f):
    """A number in which every output matters, and no two alike."""

    def function(*args):
        outputs = f(*args)
        return jnp.sum(jnp.sin(outputs["all"])) + jnp.sum(outputs["y"] ** 2) + 3 * jnp.sum(outputs["x"])

    return function


def nest(f):
    return jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, 0))


def scanned(f):
    def function(x, ys, s):
        def step(carry, y):
            outputs = f(carry, y, s)
            return jnp.tanh(outputs["all"]), outputs["y"]

        carry, stacked = jax.lax.scan(step, x, ys)
        return carry.sum() + stacked.sum()

    return function


def branched(f):
    def function(x, y, s):
        return jax.lax.cond(s > 0, lambda: f(x, y, s)["all"], lambda: x * y)

    return function


def all_args(transform):
    return lambda f: transform(f, argnums=(0, 1, 2))


COMPOSITIONS = {
    "jvp": lambda f: jax.jvp(f, (X, Y, S), (Y, X, S)),
    "jvp in one argument": lambda f: jax.jvp(lambda y: f(X, y, S), (Y,), (X,)),
    "vjp": lambda f: jax.vjp(f, X, Y, S)[1]({"all": Y, "y": X, "x": S}),
    "vjp of one output": lambda f: jax.grad(lambda *args: f(*args)["y"].sum(), (0, 1, 2))(X, Y, S),
    "value_and_grad": lambda f: jax.value_and_grad(total(f), (0, 1, 2))(X, Y, S),
    "linearize": lambda f: jax.linearize(f, X, Y, S)[1](Y, X, S),
    "linear_transpose": lambda f: jax.linear_transpose(jax.linearize(f, X, Y, S)[1], X, Y, S)(f(Y, X, S)),
    "jacfwd": lambda f: all_args(jax.jacfwd)(f)(X, Y, S),
    "jacrev": lambda f: all_args(jax.jacrev)(f)(X, Y, S),
    "hessian": lambda f: all_args(jax.hessian)(total(f))(X, Y, S),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f, 1), 0)(X, Y, S),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f, 0), 1)(X, Y, S),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f, 0), 1)(X, Y, S),
    "vmap of jvp": lambda f: jax.vmap(lambda t: jax.jvp(f, (X, Y, S), (t, Y, S))[1])(XS),
    "vmap of grad": lambda f: jax.vmap(all_args(jax.grad)(total(f)), (0, None, 0))(XS, Y, SS),
    "vmap of grad, scalar unmapped": lambda f: jax.vmap(jax.grad(total(f), 2), (0, None, None))(XS, Y, S),
    "vmap of jacfwd": lambda f: jax.vmap(all_args(jax.jacfwd)(f), (None, 0, None))(X, YS, S),
    "vmap of jacrev": lambda f: jax.vmap(all_args(jax.jacrev)(f), (None, 0, None))(X, YS, S),
    "vmap of hessian": lambda f: jax.vmap(jax.hessian(total(f), (0, 1)), (0, None, None))(XS, Y, S),
    "vmap of linearized": lambda f: jax.vmap(jax.linearize(f, X, Y, S)[1], (0, None, 0))(XS, Y, SS),
    "jvp of vmap": lambda f: jax.jvp(jax.vmap(f, (0, None, None)), (XS, Y, S), (YS, X, S)),
    "grad of vmap": lambda f: all_args(jax.grad)(total(jax.vmap(f, (0, None, 0))))(XS, Y, SS),
    "grad of vmap along axis 1": lambda f: jax.grad(total(jax.vmap(f, (1, None, None))), (0, 1, 2))(XS.T, Y, S),
    "jacfwd of vmap": lambda f: all_args(jax.jacfwd)(jax.vmap(f, (0, None, None)))(XS[:2], Y, S),
    "jacrev of vmap": lambda f: all_args(jax.jacrev)(jax.vmap(f, (None, 0, 0)))(X, YS[:2], SS[:2]),
    "hessian of vmap": lambda f: jax.hessian(total(jax.vmap(f, (0, None, None))), (0, 1))(XS[:2], Y, S),
    "linear_transpose of vmap": lambda f: jax.linear_transpose(
        jax.linearize(jax.vmap(f, (0, None, None)), XS, Y, S)[1], XS, Y, S
    )(jax.vmap(f, (0, None, None))(YS, X, S)),
    "grad of nested vmaps": lambda f: all_args(jax.grad)(total(nest(f)))(XS, YS, SS),
    "jacrev of nested vmaps": lambda f: jax.jacrev(nest(f), (1, 2))(XS[:2], YS[:2], SS[:2]),
    "vmap of grad of vmap": lambda f: jax.vmap(
        all_args(jax.grad)(total(jax.vmap(f, (0, None, None)))), (None, 0, None)
    )(XS, YS, S),
    "grad of scan": lambda f: all_args(jax.grad)(scanned(f))(X, YS, S),
    "vmap of grad of scan": lambda f: jax.vmap(all_args(jax.grad)(scanned(f)), (0, None, None))(XS, YS, S),
    "grad of scan of vmap": lambda f: all_args(jax.grad)(
        lambda xs, ys, s: scanned(lambda x, y, s: jax.vmap(f, (0, None, None))(x, y, s))(xs, ys, s)
    )(XS, YS[:, None][:, 0], S),
    "grad of cond": lambda f: jax.vmap(
        all_args(jax.grad)(lambda *args: branched(f)(*args).sum()), (0, None, 0)
    )(XS, Y, SS),
    "grad of remat": lambda f: jax.vmap(all_args(jax.grad)(jax.checkpoint(total(f))))(XS, YS, SS),
    "remat of vmap": lambda f: all_args(jax.grad)(jax.checkpoint(total(jax.vmap(f))))(XS, YS, SS),
}


def assert_close(result, wanted, rtol=1e-9, atol=1e-9):
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol, atol)


@pytest.fixture(scope="module")
def twin_results():
    """The twin's result for each composition, worked out once."""
    return {name: jax.jit(lambda c=c: c(SMOOTH.twin))() for name, c in COMPOSITIONS.items()}


@pytest.mark.parametrize(("method", "derivation"), WAYS, ids=str)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition(name, method, derivation, twin_results):
    f = device(SMOOTH, method, derivation)
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f))(), twin_results[name])
