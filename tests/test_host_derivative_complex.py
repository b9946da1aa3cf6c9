"""Complex numbers, by JAX's convention: Re(ct · t) without conjugation, and real arguments get the real part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import SS, XS, YS, S, X, Y, assert_close
from foreign import Foreign
from host_endpoints import EITHER, METHODS, on_matrix, only, with_endpoints, zeros_for_none
from jax.test_util import check_grads

ZS = jax.lax.complex(XS, YS)
Z = ZS[0]
every_method = pytest.mark.parametrize("method", METHODS)
every_given = pytest.mark.parametrize("given", EITHER.values(), ids=EITHER)


def _holomorphic(xp, z, r):
    del xp
    return z * z * r.astype(z.dtype)


HOLOMORPHIC = Foreign("holomorphic", _holomorphic, ((3,), (3,)))


def holomorphic_jvp(args, tangents):
    (z, r), (tz, tr) = args, zeros_for_none(args, tangents)
    return 2 * z * r * tz + z * z * tr


def holomorphic_vjp(args, cotangent, needed):
    """The cotangent of the real argument is complex; the caller takes the real part."""
    z, r = args
    return only((2 * z * r * cotangent, z * z * cotangent), needed)


def holomorphic_blocks(args, needed):
    z, r = args
    one = np.ones_like(z * r)
    return only((on_matrix(2 * z * r), on_matrix(z * z * one)), needed)


OF_HOLOMORPHIC = {"jvp": holomorphic_jvp, "vjp": holomorphic_vjp, "jacobian": holomorphic_blocks}


def _not_holomorphic(xp, z, r):
    return {"both": z * z * r.astype(z.dtype) + xp.conj(z), "size": xp.real(z) ** 2 + xp.imag(z) ** 2}


NOT_HOLOMORPHIC = Foreign("not_holomorphic", _not_holomorphic, ((3,), (3,)))


def not_holomorphic_jvp(args, tangents):
    """The tangent of the real output is complex; the caller takes the real part."""
    (z, r), (tz, tr) = args, zeros_for_none(args, tangents)
    return {"both": 2 * z * r * tz + z * z * tr + np.conj(tz), "size": 2 * np.conj(z) * tz + 0 * tr}


def not_holomorphic_vjp(args, cotangents, needed):
    z, r = args
    both, size = (0.0 if c is None else c for c in cotangents.values())
    to_z = 2 * z * r * both + np.conj(both) + 2 * np.conj(z) * size
    return only((to_z, z * z * both + 0 * r), needed)


OF_NOT_HOLOMORPHIC = {"jvp": not_holomorphic_jvp, "vjp": not_holomorphic_vjp}


@every_given
@every_method
def test_complex_arguments_beside_real_ones(method, given):
    f = with_endpoints(HOLOMORPHIC, method, OF_HOLOMORPHIC, given)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return (
            jax.jvp(g, (ZS, X), (ZS * 2j, Y)),
            jax.jvp(lambda r: g(ZS, r), (X,), (Y,)),
            jax.vjp(g, ZS, X)[1](ZS * 1j),
            jax.grad(lambda z, r: jnp.abs(g(z, r)).sum(), (0, 1))(ZS, X),
            jax.vmap(jax.grad(lambda z, r: jnp.imag(f(z, r)).sum(), (0, 1)), (0, None))(ZS, X),
            jax.jacfwd(lambda z: f(z, X), holomorphic=True)(Z),
            jax.jacrev(lambda z: f(z, X), holomorphic=True)(Z),
            jax.jacfwd(lambda r: f(Z, r))(X),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(HOLOMORPHIC.twin))())


@every_method
def test_functions_that_are_not_holomorphic(method):
    """A conjugate, and a real output of a complex argument."""
    f = with_endpoints(NOT_HOLOMORPHIC, method, OF_NOT_HOLOMORPHIC, ("jvp", "vjp"))

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return (
            jax.jvp(g, (ZS, X), (ZS * 2j, Y)),
            jax.vjp(g, ZS, X)[1]({"both": ZS * 1j, "size": XS}),
            jax.grad(lambda z, r: g(z, r)["size"].sum(), (0, 1))(ZS, X),
            jax.vmap(jax.grad(lambda z, r: jnp.abs(f(z, r)["both"]).sum(), (0, 1)), (0, None))(ZS, X),
            jax.jacrev(lambda z: f(z, X)["size"])(Z),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(NOT_HOLOMORPHIC.twin))())


def test_numerical_derivatives():
    f = with_endpoints(NOT_HOLOMORPHIC, "expand_dims", OF_NOT_HOLOMORPHIC, ("jvp", "vjp"))
    check_grads(jax.vmap(f, (0, None)), (ZS[:2], X), order=1, modes=["fwd", "rev"])


@every_given
@every_method
def test_a_real_output_of_a_complex_argument(method, given):
    """Re(w z) with a complex w: its block is w, and what is real takes the real part of it."""
    weights = np.array([1 + 2j, -1j, 0.5])
    projection = Foreign("projection", lambda xp, z, s: xp.real(weights * z) * s[..., None], ((3,), ()))

    def jvp(args, tangents):
        (z, s), (tz, ts) = args, zeros_for_none(args, tangents)
        return weights * (tz * s[..., None] + z * ts[..., None])

    def vjp(args, cotangent, needed):
        z, s = args
        return only((cotangent * weights * s[..., None], np.sum(cotangent * weights * z, axis=-1)), needed)

    def blocks(args, needed):
        z, s = args
        return only((on_matrix(weights * s[..., None] + 0 * z), (weights * z).real + 0 * s[..., None]), needed)

    f = with_endpoints(projection, method, {"jvp": jvp, "vjp": vjp, "jacobian": blocks}, given)

    def derivatives(f):
        g = jax.vmap(f, (0, None))
        return (
            jax.jvp(g, (ZS, S), (ZS * 1j, S)),
            jax.vjp(g, ZS, S)[1](XS),
            jax.vmap(jax.grad(lambda z, s: jnp.sin(f(z, s)).sum(), (0, 1)))(ZS, SS),
            jax.jacrev(f, (0, 1))(Z, S),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(projection.twin))())


@every_given
@every_method
def test_a_complex_output_of_a_real_argument(method, given):
    """exp(i x): the cotangent is complex, what the argument gets is real."""
    turn = Foreign("turn", lambda xp, x: xp.exp(1j * x.astype("complex128")), ((3,),))

    def slope(x):
        return 1j * np.exp(1j * x)

    endpoints = {
        "jvp": lambda args, tangents: slope(args[0]) * tangents[0],
        "vjp": lambda args, cotangent, needed: (slope(args[0]) * cotangent,),  # noqa: ARG005
        "jacobian": lambda args, needed: (on_matrix(slope(args[0])),),  # noqa: ARG005
    }
    f = with_endpoints(turn, method, endpoints, given)

    def derivatives(f):
        g = jax.vmap(f)
        return (
            jax.jvp(g, (XS,), (YS,)),
            jax.vjp(g, XS)[1](ZS),
            jax.jacfwd(f)(X),
            jax.vmap(lambda t: jax.jvp(f, (X,), (t,))[1])(YS),
            jax.vmap(jax.vjp(f, X)[1])(ZS),
        )

    assert_close(jax.jit(lambda: derivatives(f))(), jax.jit(lambda: derivatives(turn.twin))())
