"""Every way to differentiate a call of three arguments, alone and with `vmap`, `jit`, `scan`, `cond` and `remat`.

A composition takes `f(x, y, s)` with `x` and `y` of shape (3,) and `s` a number, which gives a dictionary of "all" and
"y", of shape (3,), and "x", a number. What it gives for the foreign function must be what it gives for the twin.
"""

import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
XS, YS = (jnp.asarray(RNG.normal(size=(4, 3))) for _ in range(2))
SS = jnp.asarray(RNG.normal(size=(4,)))
X, Y, S = XS[0], YS[1], SS[2]


def assert_close(result, wanted, rtol=1e-9, atol=1e-9):
    """The same tree of arrays: structure, shapes, dtypes, and values within the tolerance."""
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if got.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(_plain(got), _plain(want), rtol, atol)


def _plain(array):
    """NumPy cannot compare the dtypes that it does not know, such as bfloat16."""
    plain = np.asarray(array)
    return plain.astype("float32") if plain.dtype.kind == "V" else plain


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
        return jax.lax.cond(s > 0, lambda: f(x, y, s)["all"], lambda: x * y).sum()

    return function


def of_all(transform):
    """The transformation, in all three arguments."""
    return lambda f: transform(f, argnums=(0, 1, 2))


def by_x(f):
    return jax.vmap(f, (0, None, None))


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X, Y, S), (Y, X, S)),
    "jvp in one argument": lambda f: jax.jvp(lambda y: f(X, y, S), (Y,), (X,)),
    "linearize": lambda f: jax.linearize(f, X, Y, S)[1](Y, X, S),
    "jacfwd": lambda f: of_all(jax.jacfwd)(f)(X, Y, S),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X, Y, S), (Y, X, S)),
    "vmap of jvp": lambda f: jax.vmap(lambda t: jax.jvp(f, (X, Y, S), (t, Y, S))[1])(XS),
    "vmap of jvp, all mapped": lambda f: jax.vmap(lambda *args: jax.jvp(f, args, args)[1])(XS, YS, SS),
    "vmap of linearize": lambda f: jax.vmap(jax.linearize(f, X, Y, S)[1], (0, None, 0))(XS, Y, SS),
    "vmap of jacfwd": lambda f: jax.vmap(of_all(jax.jacfwd)(f), (None, 0, None))(X, YS, S),
    "jvp of vmap": lambda f: jax.jvp(by_x(f), (XS, Y, S), (YS, X, S)),
    "jvp of vmap, unmapped tangent": lambda f: jax.jvp(lambda s: by_x(f)(XS, Y, s), (S,), (S,)),
    "jacfwd of vmap": lambda f: of_all(jax.jacfwd)(by_x(f))(XS[:2], Y, S),
    "jacfwd of nested vmaps": lambda f: jax.jacfwd(nest(f), (1, 2))(XS[:2], YS[:2], SS[:2]),
    "jacfwd of scan": lambda f: jax.jacfwd(scanned(f), (0, 2))(X, YS, S),
    "jvp of remat": lambda f: jax.jvp(jax.checkpoint(f), (X, Y, S), (Y, X, S)),
}

REVERSE = {
    "vjp": lambda f: jax.vjp(f, X, Y, S)[1]({"all": Y, "y": X, "x": S}),
    "vjp of one output": lambda f: jax.grad(lambda *args: f(*args)["y"].sum(), (0, 1, 2))(X, Y, S),
    "value_and_grad": lambda f: jax.value_and_grad(total(f), (0, 1, 2))(X, Y, S),
    "jacrev": lambda f: of_all(jax.jacrev)(f)(X, Y, S),
    "jacobian": lambda f: jax.jacobian(lambda y: f(X, y, S))(Y),
    "grad of jit": lambda f: of_all(jax.grad)(total(jax.jit(f)))(X, Y, S),
    "vmap of vjp": lambda f: jax.vmap(lambda ct: jax.vjp(f, X, Y, S)[1]({"all": ct, "y": Y, "x": S}))(XS),
    "vmap of grad": lambda f: jax.vmap(of_all(jax.grad)(total(f)), (0, None, 0))(XS, Y, SS),
    "vmap of grad, scalar unmapped": lambda f: jax.vmap(jax.grad(total(f), 2), (0, None, None))(XS, Y, S),
    "vmap of value_and_grad": lambda f: jax.vmap(jax.value_and_grad(total(f), 1), (0, 0, None))(XS, YS, S),
    "vmap of jacrev": lambda f: jax.vmap(of_all(jax.jacrev)(f), (None, 0, None))(X, YS, S),
    "grad of vmap": lambda f: of_all(jax.grad)(total(jax.vmap(f, (0, None, 0))))(XS, Y, SS),
    "grad of vmap, axis 1": lambda f: jax.grad(
        total(jax.vmap(f, (1, None, None), {"all": 1, "y": -1, "x": 0})), (0, 1, 2)
    )(XS.T, Y, S),
    "value_and_grad of vmap": lambda f: jax.value_and_grad(total(by_x(f)), 1)(XS, Y, S),
    "jacrev of vmap": lambda f: of_all(jax.jacrev)(jax.vmap(f, (None, 0, 0)))(X, YS[:2], SS[:2]),
    "grad of nested vmaps": lambda f: of_all(jax.grad)(total(nest(f)))(XS, YS, SS),
    "jacrev of nested vmaps": lambda f: jax.jacrev(nest(f), (1, 2))(XS[:2], YS[:2], SS[:2]),
    "vmap of grad of vmap": lambda f: jax.vmap(of_all(jax.grad)(total(by_x(f))), (None, 0, None))(XS, YS, S),
    "grad of scan": lambda f: of_all(jax.grad)(scanned(f))(X, YS, S),
    "vmap of grad of scan": lambda f: by_x(of_all(jax.grad)(scanned(f)))(XS, YS, S),
    "grad of scan of vmap": lambda f: of_all(jax.grad)(scanned(by_x(f)))(XS, YS, S),
    "grad of cond": lambda f: of_all(jax.grad)(branched(f))(X, Y, S),
    "vmap of grad of cond": lambda f: jax.vmap(of_all(jax.grad)(branched(f)), (0, None, 0))(XS, Y, SS),
    "vmap of grad of remat": lambda f: jax.vmap(of_all(jax.grad)(jax.checkpoint(total(f))))(XS, YS, SS),
    "grad of remat of vmap": lambda f: of_all(jax.grad)(jax.checkpoint(total(jax.vmap(f))))(XS, YS, SS),
    "linear_transpose": lambda f: jax.linear_transpose(jax.linearize(f, X, Y, S)[1], X, Y, S)(f(Y, X, S)),
    "linear_transpose of vmap": lambda f: jax.linear_transpose(jax.linearize(by_x(f), XS, Y, S)[1], XS, Y, S)(
        by_x(f)(YS, X, S)
    ),
}

SECOND = {
    "hessian": lambda f: of_all(jax.hessian)(total(f))(X, Y, S),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f, 1), 0)(X, Y, S),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, 0), 1)(X, Y, S),
    "jacfwd of jacrev": lambda f: jax.jacfwd(jax.jacrev(f, 2), (0, 1))(X, Y, S),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f, 0), (1, 2))(X, Y, S),
    "jvp of grad": lambda f: jax.jvp(of_all(jax.grad)(total(f)), (X, Y, S), (Y, X, S)),
    "grad of jvp": lambda f: jax.grad(lambda x, s: total(lambda *a: jax.jvp(f, a, (Y, X, S))[1])(x, Y, s), (0, 1))(
        X, S
    ),
    "vmap of hessian": lambda f: by_x(jax.hessian(total(f), (0, 1)))(XS, Y, S),
    "hessian of vmap": lambda f: jax.hessian(total(by_x(f)), (0, 1))(XS[:2], Y, S),
    "vmap of jvp of grad": lambda f: jax.vmap(lambda t: jax.jvp(jax.grad(total(f)), (X, Y, S), (t, Y, S))[1])(XS),
    "grad of scan of grad": lambda f: jax.grad(scanned(lambda *a: {**f(*a), "all": jax.grad(total(f), 1)(*a)}))(
        X, YS[:2], S
    ),
    "hessian of remat": lambda f: jax.hessian(jax.checkpoint(total(f)), 1)(X, Y, S),
    "hessian of nested vmaps": lambda f: jax.hessian(total(nest(f)), (1, 2))(XS[:2], YS[:2], SS[:2]),
}
