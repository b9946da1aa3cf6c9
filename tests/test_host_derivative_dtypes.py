"""Derivatives of host calls of every dtype: integers and booleans beside floats, complex and small ones, 0-d."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import SS, XS, YS, S, X, Y, assert_close
from foreign import Foreign
from host_endpoints import EITHER, METHODS, on_matrix, only, with_endpoints, zeros_for_none

import batchrules

every_method = pytest.mark.parametrize("method", METHODS)
every_given = pytest.mark.parametrize("given", EITHER.values(), ids=EITHER)


# --- integer and boolean arguments ----------------------------------------------------------------------------


def _gather(xp, x, index, scale):
    lead = np.broadcast_shapes(x.shape[:-1], index.shape[:-1])
    x, index = (xp.broadcast_to(a, (*lead, a.shape[-1])) for a in (x, index))
    taken = xp.take_along_axis(x, index, axis=-1)
    return taken * taken * scale[..., None]


GATHER = Foreign("gather", _gather, ((3,), (2,), ()))


def gathered(args):
    """The arguments with equal leads, and which input each output takes."""
    ranks = (1, 1, 0)
    leads = [a.shape[: a.ndim - rank] for a, rank in zip(args, ranks, strict=True)]
    lead = np.broadcast_shapes(*leads)
    x, index, scale = (
        np.broadcast_to(
            a.reshape((*(own or (1,) * len(lead)), *a.shape[a.ndim - rank :])), (*lead, *a.shape[len(own) :])
        )
        for a, own, rank in zip(args, leads, ranks, strict=True)
    )
    return x, index, scale, index[..., None] == np.arange(3)


def gather_blocks(args, needed):
    x, index, scale, chosen = gathered(args)
    taken = np.take_along_axis(x, index, axis=-1)
    assert needed[1] is False
    by_x = chosen * (2 * taken * scale[..., None])[..., None]
    return by_x if needed[0] else None, None, taken * taken if needed[2] else None


def gather_jvp(args, tangents):
    assert tangents[1] is None
    by_x, _, by_scale = gather_blocks(args, (True, False, True))
    parts = [] if tangents[0] is None else [np.einsum("...ij,...j", by_x, tangents[0])]
    return sum(parts) if tangents[2] is None else sum(parts) + by_scale * tangents[2][..., None]


def gather_vjp(args, cotangent, needed):
    by_x, _, by_scale = gather_blocks(args, (True, False, True))
    to_x = np.einsum("...ij,...i->...j", by_x, cotangent) if needed[0] else None
    return to_x, None, np.sum(by_scale * cotangent, axis=-1) if needed[2] else None


OF_GATHER = {"jvp": gather_jvp, "vjp": gather_vjp, "jacobian": gather_blocks}
INDICES = jnp.array([[0, 2], [1, 1], [2, 0], [2, 2]])


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, 0), (0, 0, None)], ids=str)
@every_given
@every_method
def test_integer_arguments(method, given, in_axes):
    args = [x if axis == 0 else x[0] for x, axis in zip((XS, INDICES, SS), in_axes, strict=True)]
    f = with_endpoints(GATHER, method, OF_GATHER, given)

    def derivatives(f):
        g = jax.vmap(f, in_axes)
        gradient = jax.grad(lambda *a: jnp.sin(g(*a)).sum(), (0, 2))(*args)
        return gradient, jax.jvp(lambda x, s: g(x, args[1], s), (args[0], args[2]), (args[0], args[2]))[1]

    assert_close(jax.jit(lambda: derivatives(f))(), derivatives(GATHER.twin))


@every_given
@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd])
def test_integer_arguments_take_and_give_float0(transform, given):
    f = with_endpoints(GATHER, "sequential", OF_GATHER, given)
    index = INDICES[0]
    assert_close(transform(f)(X, index, S), transform(GATHER.twin)(X, index, S))
    primals, pull = jax.vjp(f, X, index, S)
    assert_close(pull(primals), jax.vjp(GATHER.twin, X, index, S)[1](primals))
    zero = np.zeros(2, jax.dtypes.float0)
    assert_close(jax.jvp(f, (X, index, S), (Y, zero, S)), jax.jvp(GATHER.twin, (X, index, S), (Y, zero, S)))
    assert_close(
        jax.jit(jax.grad(lambda *a: f(*a).sum(), 1, allow_int=True))(X, index, S), np.zeros(2, jax.dtypes.float0)
    )


@every_given
@every_method
def test_boolean_arguments(method, given):
    masked = Foreign("masked", lambda xp, x, keep: xp.where(keep, x * x, -x), ((3,), (3,)))

    def slope(x, keep):
        return np.where(keep, 2 * x, -1.0)

    endpoints = {
        "jvp": lambda args, tangents: slope(*args) * tangents[0],
        "vjp": lambda args, cotangent, needed: (slope(*args) * cotangent, None),  # noqa: ARG005
        "jacobian": lambda args, needed: (on_matrix(slope(*args)), None),  # noqa: ARG005
    }
    f = with_endpoints(masked, method, endpoints, given)

    def derivatives(f):
        g = jax.vmap(f)
        return jax.grad(lambda x: jnp.sin(g(x, YS > 0)).sum())(XS), jax.jacfwd(g)(XS, YS > 0)

    assert_close(jax.jit(lambda: derivatives(f))(), derivatives(masked.twin))


# --- integer and boolean outputs ------------------------------------------------------------------------------


def _two_kinds(xp, x, y):
    return {"rank": xp.argmax(x * y, axis=-1).astype("int32"), "positive": x > y, "product": x * y * y}


TWO_KINDS = Foreign("two_kinds", _two_kinds, ((3,), (3,)))


def two_kinds_jvp(args, tangents):
    x, y = args
    by_x = 0 if tangents[0] is None else tangents[0] * y * y
    by_y = 0 if tangents[1] is None else 2 * x * y * tangents[1]
    return {"rank": None, "positive": None, "product": by_x + by_y}


def two_kinds_vjp(args, cotangents, needed):
    x, y = args
    assert cotangents["rank"] is None
    assert cotangents["positive"] is None
    given = cotangents["product"]
    return given * y * y if needed[0] else None, 2 * given * x * y if needed[1] else None


def two_kinds_blocks(args, needed):
    x, y = args
    blocks = on_matrix(y * y + 0 * x), on_matrix(2 * x * y)
    return {"rank": (None, None), "positive": None, "product": only(blocks, needed)}


OF_TWO_KINDS = {"jvp": two_kinds_jvp, "vjp": two_kinds_vjp, "jacobian": two_kinds_blocks}


@every_given
@every_method
def test_integer_and_boolean_outputs(method, given):
    """Their tangents are float0; an endpoint gives, and gets, None for them."""
    f = with_endpoints(TWO_KINDS, method, OF_TWO_KINDS, given)

    def tangents(f):
        return jax.jvp(jax.vmap(f, (0, None)), (XS, Y), (YS, X))

    def gradients(f):
        return jax.grad(lambda x, y: jnp.sin(jax.vmap(f, (0, None))(x, y)["product"]).sum(), (0, 1))(XS, Y)

    assert_close(tangents(f), tangents(TWO_KINDS.twin))
    assert_close(jax.jit(lambda: gradients(f))(), gradients(TWO_KINDS.twin))


@every_given
def test_a_vjp_takes_float0_for_integer_outputs(given):
    f = with_endpoints(TWO_KINDS, "sequential", OF_TWO_KINDS, given)
    outputs = TWO_KINDS.twin(X, Y)
    cotangents = {
        "rank": np.zeros((), jax.dtypes.float0),
        "positive": np.zeros(3, jax.dtypes.float0),
        "product": outputs["product"],
    }
    assert_close(jax.vjp(f, X, Y)[1](cotangents), jax.vjp(TWO_KINDS.twin, X, Y)[1](cotangents))


def test_integers_alone_need_no_endpoint():
    """Nothing depends on them smoothly, so every derivative is zero and nothing is asked for."""
    f = batchrules.host_call(np.argmax, jax.ShapeDtypeStruct((), "int64"))
    assert_close(
        jax.grad(lambda x: (x * f(x).astype("float64")).sum())(X), jnp.full(3, jnp.argmax(X)).astype("float64")
    )
    assert jax.jvp(f, (X,), (Y,))[1].dtype == jax.dtypes.float0


# --- small dtypes, and 0-d ------------------------------------------------------------------------------------

QUADRATIC = Foreign("quadratic", lambda xp, x, y: x * y - y * y, ((3,), (3,)))  # noqa: ARG005


def quadratic_jvp(args, tangents):
    x, y = args
    tx, ty = zeros_for_none(args, tangents)
    return tx * y + (x - y - y) * ty


def quadratic_vjp(args, cotangent, needed):
    x, y = args
    return cotangent * y if needed[0] else None, cotangent * (x - y - y) if needed[1] else None


def quadratic_blocks(args, needed):
    x, y = args
    blocks = on_matrix(y + np.zeros_like(x)), on_matrix(x - y - y)
    return only(blocks, needed)


OF_QUADRATIC = {"jvp": quadratic_jvp, "vjp": quadratic_vjp, "jacobian": quadratic_blocks}


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "complex64", "complex128"])
@every_given
@every_method
def test_dtypes(method, given, dtype):
    """Whole numbers, and sums of four of them, are exact in every dtype."""
    x, y = (jnp.round(2 * a).astype(dtype) for a in (XS, Y))
    f = with_endpoints(QUADRATIC, method, OF_QUADRATIC, given)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        holomorphic = x.dtype.kind == "c"
        return (
            jax.jvp(g, (x, y), (x, y))[1],
            jax.vjp(g, x, y)[1](x),
            jax.jacrev(f, (0, 1), holomorphic=holomorphic)(x[0], y),
            jax.jacfwd(f, 1, holomorphic=holomorphic)(x[0], y),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(QUADRATIC.twin))(), 0, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_given
def test_long_sums_of_small_dtypes(dtype, given):
    """What is summed over 3000 elements stays exact in 32 bits; in 16 it would stop growing at 256 or 2048."""
    f = with_endpoints(QUADRATIC, "expand_dims", OF_QUADRATIC, given)
    x, y = jnp.full((3000, 3), 2, dtype), jnp.zeros(3, dtype)
    summed = jax.jit(jax.grad(lambda y: jax.vmap(f, (0, None))(x, y).sum(dtype=dtype)))(y)
    assert summed.dtype == dtype
    np.testing.assert_allclose(np.asarray(summed.astype("float64")), 6000, rtol=0.004)


@every_given
@every_method
def test_numbers(method, given):
    """0-d arrays, and Python numbers from the endpoints."""
    scalars = Foreign("scalars", lambda xp, s, t: s * s * t, ((), ()))  # noqa: ARG005

    def jvp(args, tangents):
        (s, t), (ds, dt) = args, (0.0 if tangent is None else tangent for tangent in tangents)
        return 2 * s * t * ds + s * s * dt

    endpoints = {
        "jvp": jvp,
        "vjp": lambda args, c, needed: (2 * args[0] * args[1] * c if needed[0] else None, args[0] ** 2 * c),
        "jacobian": lambda args, needed: (2 * args[0] * args[1] if needed[0] else None, args[0] ** 2 + 0 * args[1]),
    }
    if method == "sequential":
        endpoints = {"jvp": lambda *a: float(jvp(*a)), "vjp": endpoints["vjp"], "jacobian": endpoints["jacobian"]}
    f = with_endpoints(scalars, method, endpoints, given)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return jax.grad(f, (0, 1))(S, S), jax.grad(lambda *a: g(*a).sum(), (0, 1))(SS, S), jax.jacfwd(g, (0, 1))(SS, S)

    assert_close(jax.jit(lambda: derivatives(f))(), derivatives(scalars.twin))


@every_given
@every_method
def test_arrays_without_elements(method, given):
    empty = Foreign("quadratic", QUADRATIC.function, ((0,), (0,)))

    def no_blocks(args, needed):
        lead = np.broadcast_shapes(*(a.shape[:-1] for a in args))
        return tuple(np.zeros((*lead, 0, 0)) for _ in needed)

    f = with_endpoints(empty, method, {**OF_QUADRATIC, "jacobian": no_blocks}, given)
    x = jnp.zeros((4, 0))
    gradient = jax.jit(jax.grad(lambda x, y: jax.vmap(f, (0, None))(x, y).sum(), (0, 1)))
    assert_close(gradient(x, x[0]), (x, x[0]))
    assert_close(jax.jvp(jax.vmap(f), (x, x), (x, x)), (x, x))
