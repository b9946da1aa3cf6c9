"""The Tesseracts of `tesseracts/` in pure JAX, and ways to transform a function of `x` and `s`."""

import jax
import jax.numpy as jnp
import numpy as np
from batchrules_tesseract import apply_tesseract

RNG = np.random.default_rng(0)
XS = jnp.asarray(RNG.normal(size=(4, 3)))
SS = jnp.asarray(RNG.normal(size=(4, 3)))
NUMBERS = jnp.asarray([1.0, 2.0, 3.0, -1.5])


def twin(x, s):
    """What tesseracts/recipe.py computes for one element."""
    return jnp.sin(x) * s


def call(tesseract, **options):
    """The same through a Tesseract."""

    def function(x, s):
        return apply_tesseract(tesseract, {"x": x, "s": s}, **options)["y"]

    return function


def close(got, wanted):
    """The same tree, shapes, dtypes, and values to double precision."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def total(f):
    return lambda x, s: jnp.sum(jnp.cos(f(x, s)))


# Each takes f(x, s) with x of shape (3,) and s of that shape or (), and N values of both.
COMPOSITIONS = {
    "call": lambda f, xs, ss: f(xs[0], ss[0]),
    "jit": lambda f, xs, ss: jax.jit(f)(xs[0], ss[0]),
    "vmap": lambda f, xs, ss: jax.vmap(f)(xs, ss),
    "vmap over x": lambda f, xs, ss: jax.vmap(f, (0, None))(xs, ss[1]),
    "vmap over s": lambda f, xs, ss: jax.vmap(f, (None, 0))(xs[1], ss),
    "vmap out_axes": lambda f, xs, ss: jax.vmap(f, (1, 0), out_axes=1)(xs.T, ss),
    "vmap vmap": lambda f, xs, ss: jax.vmap(jax.vmap(f, (0, None)), (None, 0))(xs, ss),
    "vmap vmap the other way": lambda f, xs, ss: jax.vmap(jax.vmap(f, (None, 0)), (0, None))(xs, ss),
    "jit vmap": lambda f, xs, ss: jax.jit(jax.vmap(f))(xs, ss),
    "vmap jit": lambda f, xs, ss: jax.vmap(jax.jit(f))(xs, ss),
    "scan": lambda f, xs, ss: jax.lax.scan(lambda c, x: (c + f(x, ss[0]).sum(), f(x, c * ss[0])), 1.0, xs),
    "jvp": lambda f, xs, ss: jax.jvp(f, (xs[0], ss[0]), (xs[1], ss[1])),
    "vmap jvp": lambda f, xs, ss: jax.vmap(lambda t: jax.jvp(f, (xs[0], ss[0]), (t, ss[1])))(xs),
    "jvp vmap": lambda f, xs, ss: jax.jvp(jax.vmap(f), (xs, ss), (xs + 1.0, ss)),
    "linearize": lambda f, xs, ss: jax.vmap(jax.linearize(f, xs[0], ss[0])[1])(xs, ss),
    "grad": lambda f, xs, ss: jax.grad(total(f), (0, 1))(xs[0], ss[0]),
    "vmap grad": lambda f, xs, ss: jax.vmap(jax.grad(total(f), (0, 1)))(xs, ss),
    "vmap grad of unmapped s": lambda f, xs, ss: jax.vmap(jax.grad(total(f), 1), (0, None))(xs, ss[0]),
    "vmap grad beside unmapped s": lambda f, xs, ss: jax.vmap(jax.grad(total(f)), (0, None))(xs, ss[0]),
    "grad vmap": lambda f, xs, ss: jax.grad(lambda x, s: jax.vmap(f, (0, None))(x, s).sum(), (0, 1))(xs, ss[2]),
    "value_and_grad": lambda f, xs, ss: jax.value_and_grad(total(f), (0, 1))(xs[0], ss[0]),
    "vmap vjp": lambda f, xs, ss: jax.vmap(jax.vjp(f, xs[0], ss[0])[1])(xs),
    "jacfwd": lambda f, xs, ss: jax.jacfwd(f, (0, 1))(xs[0], ss[0]),
    "jacrev": lambda f, xs, ss: jax.jacrev(f, (0, 1))(xs[0], ss[0]),
    "vmap jacfwd": lambda f, xs, ss: jax.vmap(jax.jacfwd(f))(xs, ss),
    "vmap jacrev": lambda f, xs, ss: jax.vmap(jax.jacrev(f, 1))(xs, ss),
    "jit jacrev": lambda f, xs, ss: jax.jit(jax.jacrev(f))(xs[0], ss[0]),
    "checkpoint": lambda f, xs, ss: jax.grad(jax.checkpoint(total(f)))(xs[0], ss[0]),
    "cond": lambda f, xs, ss: jax.lax.cond(xs[0, 0] > 0, lambda: f(xs[0], ss[0]), lambda: f(xs[1], ss[1])),
}
