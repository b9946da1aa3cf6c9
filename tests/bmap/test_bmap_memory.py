"""What is in memory besides arguments and results: one chunk. The figures are the compiler's own."""

import gc

import jax
import jax.numpy as jnp
import pytest
from bmap_cases import random

from batchrules._bmap import bmap

WIDTH, SIZE, BATCH = 64, 4096, 128
ROW = 8 * WIDTH
WHOLE, CHUNK = SIZE * ROW, BATCH * ROW


def layers(a):
    for seed in range(3):
        a = jnp.tanh(random((WIDTH, WIDTH), seed) @ a)
    return a


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def inputs(size, axis=0):
    return random((size, WIDTH) if axis == 0 else (WIDTH, size), 9)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_forward(size, axis):
    ours = bmap(layers, axis, axis, batch_size=BATCH)
    assert temporaries(ours, inputs(size, axis)) < 8 * CHUNK < WHOLE / 2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_gradient_with_checkpoint_keeps_one_chunk(size, axis):
    ours = bmap(layers, axis, axis, batch_size=BATCH, checkpoint=True)
    gradient = jax.grad(lambda a: jnp.sum(ours(a) ** 2))
    # The results themselves (or their cotangents), and a few arrays of a chunk.
    assert temporaries(gradient, inputs(size, axis)) < WHOLE + 16 * CHUNK


@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_gradient_takes_less_than_that_of_map(size):
    def gradient(mapped):
        return jax.grad(lambda a: jnp.sum(mapped(a) ** 2))

    ours = gradient(bmap(layers, batch_size=BATCH))
    peer = gradient(lambda a: jax.lax.map(layers, a, batch_size=BATCH))
    assert temporaries(ours, inputs(size)) < 0.8 * temporaries(peer, inputs(size))


# A chunk's cotangent is read in several places, or in none before its input's is written.
IN_PLACE = {
    "layers": layers,
    "scaled": lambda a: a * jnp.arange(1.0, WIDTH + 1),
    "normalised": lambda a: (a - a.mean()) / jnp.sqrt(a.var() + 1e-5),
    "rolled": lambda a: jnp.roll(a, 1) * 2 + a[::-1],
}


@pytest.mark.parametrize("f", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_the_gradient_is_written_over_the_results_cotangent(f, size):
    ours = bmap(f, batch_size=BATCH, checkpoint=True)
    gradient = jax.grad(lambda a: jnp.sum(ours(a) ** 2))
    assert temporaries(gradient, inputs(size)) < 8 * CHUNK < WHOLE / 2


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA drops barriers on CPU before jax 0.12")
@pytest.mark.parametrize(("f", "arrays_kept"), [(lambda a: 3 * a, 0), (lambda a: a * a, 1)], ids=["scaled", "squared"])
def test_a_cotangent_that_is_fused_with_the_loop_is_still_written_over(f, arrays_kept):
    ours = bmap(f, batch_size=BATCH)

    def gradient(a, cotangent):
        return 2 * jax.vjp(ours, ours(a))[1](jnp.sin(cotangent))[0]

    a = inputs(SIZE + 1)
    assert temporaries(gradient, a, a) < arrays_kept * a.nbytes + 8 * CHUNK


def test_arrays_for_a_gradient_are_made_after_the_way_forward(monkeypatch):
    """It is one array less than when they are made of constants, which XLA makes at the start."""

    def taken():
        ours = bmap(lambda a: jnp.sum(layers(a)[:8]), batch_size=BATCH)
        gradient = jax.grad(lambda a: jnp.sum(ours(jnp.sin(a)) ** 2))
        jax.clear_caches()
        return temporaries(lambda a: jnp.sum(gradient(a) ** 2), inputs(SIZE))

    late = taken()
    monkeypatch.setattr("batchrules._bmap_allocate.is_placed_explicitly", lambda _: True)  # those are left alone
    assert late < taken() - 0.9 * WHOLE


def test_gradients_of_reverse_over_reverse_do_not_grow_with_the_chunks():
    """No whole array is kept for each chunk."""
    ours = bmap(layers, batch_size=BATCH, checkpoint=True)
    twice = jax.grad(lambda a: jnp.sum(jax.grad(lambda a: jnp.sum(ours(a) ** 2))(a) ** 2))
    assert temporaries(twice, inputs(SIZE)) < 4 * WHOLE


@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_a_tangent_is_written_over_the_arguments_tangent(size):
    ours = bmap(layers, batch_size=BATCH)

    def moved(a):
        return jax.jvp(ours, (a,), (jnp.sin(a),))[1]

    assert temporaries(moved, inputs(size)) < 8 * CHUNK < WHOLE / 2


def compiled_programs():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def test_a_call_outside_jit_keeps_no_compiled_program():
    a, ours = inputs(64), bmap(layers, batch_size=8, checkpoint=True)
    both = jax.value_and_grad(lambda a: jnp.sum(ours(a)))
    jax.block_until_ready(both(a))
    before = compiled_programs()
    for _ in range(3):
        jax.block_until_ready(both(a))
    assert compiled_programs() == before


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", (0.0, jnp.add)])
def test_a_reduction_keeps_one_chunk(reduce):
    ours = bmap(layers, batch_size=BATCH, reduce=reduce)
    assert temporaries(ours, inputs(SIZE)) < 8 * CHUNK


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_gradient_of_a_reduction_keeps_one_chunk(reduce):
    ours = bmap(lambda a: jnp.sum(layers(a) ** 2), batch_size=BATCH, reduce=reduce, checkpoint=True)
    assert temporaries(jax.grad(ours), inputs(SIZE)) < 24 * CHUNK


def test_no_whole_array_is_transposed_or_concatenated():
    ours = jax.make_jaxpr(bmap(lambda a: a * 2, 1, 1, batch_size=BATCH))(inputs(SIZE + 1, 1))
    names = {eqn.primitive.name for eqn in ours.jaxpr.eqns}
    assert not names & {"transpose", "concatenate", "pad", "gather"}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gradient_keeps_no_copy_of_its_arguments(axis):
    """However many devices there are, for which the axis is divided into blocks."""

    def loss(w, a):
        return jnp.sum(bmap(lambda w, a: w @ a, (None, axis), batch_size=BATCH)(w, a) ** 2)

    w, a = random((WIDTH, WIDTH)), inputs(SIZE, axis)
    # The results and their cotangents.
    assert temporaries(jax.grad(loss), w, a) < 2 * WHOLE + 8 * CHUNK
