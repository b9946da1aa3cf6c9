"""axis_name= works where a chunk is the whole axis, and is an error elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from batchrules._bmap import bmap

COLLECTIVES = {
    "psum": lambda a: lax.psum(a, "i"),
    "pmean": lambda a: lax.pmean(a, "i"),
    "pmax": lambda a: lax.pmax(a, "i"),
    "all_gather": lambda a: lax.all_gather(a, "i"),
    "axis_index": lambda a: lax.axis_index("i") * a.astype("int32"),
    "ppermute": lambda a: lax.ppermute(a, "i", [(k, (k + 1) % 7) for k in range(7)]),
    "inside jit": jax.jit(lambda a: lax.psum(a, "i")),
    "inside scan": lambda a: lax.scan(lambda c, _: (lax.pmean(c, "i"), None), a, length=2)[0],
    "inside cond": lambda a: lax.cond(jnp.asarray(True), lambda a: lax.psum(a, "i"), jnp.sin, a),
}


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("batch_size", [7, 100, None])
def test_a_chunk_that_is_the_whole_axis(name, batch_size):
    ours = bmap(COLLECTIVES[name], axis_name="i", batch_size=batch_size)(random(7))
    assert_close(ours, jax.vmap(COLLECTIVES[name], axis_name="i")(random(7)))


def test_a_whole_axis_that_is_reduced():
    ours = bmap(lambda a: a / lax.psum(a, "i"), axis_name="i", batch_size=7, reduce="sum")
    assert_close(ours(random(7)), jnp.sum(random(7) / jnp.sum(random(7))))


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("batch_size", [1, 6])
def test_real_chunks(name, batch_size):
    with pytest.raises(ValueError, match=r"collective over the axis 'i', which needs all 7 elements.*batch_size=None"):
        bmap(COLLECTIVES[name], axis_name="i", batch_size=batch_size)(random(7))


def test_the_length_of_the_axis_is_known_to_each_chunk():
    ours = bmap(lambda a: a * lax.psum(1, "i"), axis_name="i", batch_size=3)
    assert_close(ours(random(7)), random(7) * 7)


def test_a_name_that_nothing_uses():
    assert_close(bmap(jnp.sin, axis_name="i", batch_size=3)(random(7)), jnp.sin(random(7)))


def test_collectives_over_other_axes():
    def f(by):
        return jax.vmap(by(lambda a: a - lax.pmean(a, "outer")), axis_name="outer")

    assert_close(f(lambda g: bmap(g, batch_size=3))(random((4, 7))), f(jax.vmap)(random((4, 7))))
    inner = bmap(jax.vmap(lambda b: lax.psum(b, "i"), axis_name="i"), axis_name="i", batch_size=3)
    assert_close(inner(random((7, 4))), jnp.broadcast_to(jnp.sum(random((7, 4)), axis=1, keepdims=True), (7, 4)))


# --- in derivative rules ----------------------------------------------------------------------------------------------


@jax.custom_jvp
def forward(x):
    return jnp.sin(x)


@forward.defjvp
def _(primals, tangents):
    return forward(*primals), tangents[0] * lax.psum(1.0 + 0 * primals[0], "i")


@jax.custom_vjp
def backward(x):
    return jnp.sin(x)


backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * lax.psum(x, "i"),))


@jax.custom_vjp
def on_the_way(x):
    return jnp.sin(x)


on_the_way.defvjp(lambda x: (jnp.sin(x), lax.psum(x, "i")), lambda total, ct: (ct * total,))


@pytest.mark.parametrize("f", [forward, backward, on_the_way])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_in_a_derivative_rule(f, checkpoint, jit):
    def gradient(mapped):
        both = jax.value_and_grad(lambda a: jnp.sum(mapped(a)))
        return (jax.jit(both) if jit else both)(random(7))

    ours = functools.partial(bmap, f, axis_name="i", checkpoint=checkpoint)
    assert_close(ours(batch_size=3)(random(7)), jnp.sin(random(7)))
    assert_close(gradient(ours(batch_size=7)), gradient(jax.vmap(f, axis_name="i")))
    with pytest.raises(ValueError, match=r"collective over the axis 'i', which needs all 7 elements.* a chunk has 3\."):
        gradient(ours(batch_size=3))


def test_another_unbound_name_in_a_derivative_rule():
    ours = bmap(forward, axis_name="index", batch_size=3)
    with pytest.raises(NameError, match="unbound axis name: i"):
        jax.grad(lambda a: jnp.sum(ours(a)))(random(7))
    with pytest.raises(NameError, match="unbound axis name: i"):
        jax.grad(lambda a: jnp.sum(bmap(forward, batch_size=3)(a)))(random(7))


@pytest.mark.parametrize("axes", [(0,), (np.int64(0),), ((0, 1),), None], ids=str)
def test_axes_of_a_primitive_that_are_no_names(axes):
    primitive = Primitive("mine")
    primitive.def_abstract_eval(lambda a, **_: a)
    batching.primitive_batchers[primitive] = lambda args, dims, **params: (primitive.bind(*args, **params), dims[0])
    mlir.register_lowering(primitive, mlir.lower_fun(lambda a, **_: a * 2, multiple_results=False))
    for batch_size in (3, "auto"):
        limit = {"max_bytes": 10**6} if batch_size == "auto" else {}
        ours = bmap(lambda a: primitive.bind(a, axes=axes), axis_name="i", batch_size=batch_size, **limit)
        assert_close(ours(random(7)), random(7) * 2)
