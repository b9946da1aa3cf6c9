"""Derivatives of a `host_call`: a Jacobian in one call, and a gradient against one that is written with JAX alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, median_seconds, ratio_row, show

import batchrules

SIZE = 50
ROW = jax.ShapeDtypeStruct((SIZE,), "float32")
MIXING = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype("float32")


def layer(x: Any) -> Any:
    return np.tanh(np.asarray(x) @ MIXING)


def layer_vjp(args: Any, cotangents: Any, needed: Any) -> Any:  # noqa: ARG001  # the interface of an endpoint
    slope = 1 - layer(args[0]) ** 2
    return ((cotangents * slope) @ MIXING.T,)


def rows() -> Iterator[Row]:
    yield _jacobian()
    yield _gradient()


def _jacobian() -> Row:
    """All rows in one call of the endpoint, against one call for each row, which is what `jax.pure_callback` makes."""
    x = jnp.linspace(-1, 1, SIZE, dtype="float32")
    ours = jax.jit(jax.jacrev(batchrules.host_call(layer, ROW, method="expand_dims", vjp=layer_vjp)))
    theirs = jax.jit(jax.jacrev(_by_callbacks))
    assert np.allclose(ours(x), theirs(x), atol=1e-5)
    times = median_seconds({"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, rounds=101, repeats=3)
    what = f"jacrev of a vectorised ({SIZE},) -> ({SIZE},) host_call"
    return ratio_row(what, "custom_vjp, a pure_callback per row", times["ours"], times["theirs"], 1 / 20)


def _gradient() -> Row:
    """One gradient, against `jax.custom_vjp` around two `jax.pure_callback`s."""
    x = jnp.linspace(-1, 1, SIZE, dtype="float32")
    call = batchrules.host_call(layer, ROW, vjp=layer_vjp)
    ours = jax.jit(jax.value_and_grad(lambda x: call(x).sum()))
    theirs = jax.jit(jax.value_and_grad(lambda x: _by_callbacks(x).sum()))
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert np.allclose(a, b, atol=1e-4)
    times = median_seconds({"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, rounds=201, repeats=10)
    what = "host_call, value_and_grad, jitted"
    return ratio_row(what, "custom_vjp, two pure_callbacks", times["ours"], times["theirs"], 0.25)


@jax.custom_vjp
def _by_callbacks(x: Any) -> Any:
    return jax.pure_callback(layer, ROW, x, vmap_method="sequential")


def _forward(x: Any) -> Any:
    return _by_callbacks(x), x


def _backward(x: Any, cotangent: Any) -> Any:
    def pull(x: Any, cotangent: Any) -> Any:
        # pure_callback hands over jax.Arrays, on which arithmetic would be a JAX program inside the callback.
        return layer_vjp((np.asarray(x),), np.asarray(cotangent), (True,))

    return jax.pure_callback(pull, (ROW,), x, cotangent, vmap_method="sequential")


_by_callbacks.defvjp(_forward, _backward)


if __name__ == "__main__":
    show(rows())
