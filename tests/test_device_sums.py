"""The cotangent of an argument that a batch shares is added up as it comes, in one buffer of its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close
from jax.sharding import PartitionSpec as P
from sharded import assert_right_everywhere, auto, explicit, put, using

import batchrules

LOOPS = {
    "sequential": {"method": "sequential"},
    "chunks": {"method": "broadcast_all", "batch_size": 2},
    "chunks and a tail": {"method": "expand_dims", "batch_size": 5},
    "chunks of one": {"method": "expand_dims", "batch_size": 1},
}
WAYS = {**LOOPS, "unrolled": {"method": "sequential_unrolled"}}
every_loop = pytest.mark.parametrize("options", LOOPS.values(), ids=LOOPS)
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)

RNG = np.random.default_rng(0)
XS, YS = RNG.normal(size=(12, 3)), RNG.normal(size=(4, 3))
MEGABYTE = 2**20


def wave(x, y):
    return jnp.sin(x) * y * y


def total(f):
    return lambda *args: jnp.cos(f(*args)).sum()


PROGRAMS = {
    "grad of vmap": lambda f: jax.grad(total(jax.vmap(f, (0, None))), (0, 1))(XS, YS[0]),
    "of the shared one alone": lambda f: jax.grad(total(jax.vmap(f, (0, None))), 1)(XS, YS[0]),
    "shared along both axes": lambda f: jax.grad(total(jax.vmap(jax.vmap(f, (0, None)), (0, None))), 1)(
        XS.reshape(3, 4, 3), YS[0]
    ),
    "shared along the outer axis": lambda f: jax.grad(total(jax.vmap(jax.vmap(f), (0, None))), 1)(
        XS.reshape(3, 4, 3), YS
    ),
    "shared along one axis each": lambda f: jax.grad(total(jax.vmap(jax.vmap(f, (0, None)), (None, 0))), (0, 1))(
        XS[:3], YS
    ),
    "vmap of grad of vmap": lambda f: jax.vmap(jax.grad(total(jax.vmap(f, (0, None))), 1), (None, 0))(XS[:3], YS),
    "hessian": lambda f: jax.hessian(total(jax.vmap(f, (0, None))), 1)(XS, YS[0]),
    "no elements": lambda f: jax.grad(total(jax.vmap(jax.vmap(f, (0, None)), (0, None))), (0, 1))(
        np.zeros((2, 0, 3)), YS[0]
    ),
}


@every_way
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, options):
    f = batchrules.device_call(wave, **options)
    assert_close(jax.jit(lambda: PROGRAMS[name](f))(), PROGRAMS[name](wave))


@every_loop
@pytest.mark.parametrize("nested", [False, True], ids=["vmap", "nested vmaps"])
def test_memory_is_that_of_one_cotangent_and_not_of_all(nested, options):
    """300 elements share a megabyte; stacked, their cotangents would be 300."""
    f = batchrules.device_call(lambda x, y: x * y[..., 0], **options)
    mapped = jax.vmap(jax.vmap(f, (0, None)), (0, None)) if nested else jax.vmap(f, (0, None))
    xs, y = jnp.ones((15, 20) if nested else 300), jnp.ones(MEGABYTE // 8)
    program = jax.jit(jax.grad(lambda y: mapped(xs, y).sum())).lower(y).compile()
    assert program.memory_analysis().temp_size_in_bytes < 10 * MEGABYTE
    assert program(y)[0] == 300


@every_loop
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("nested", [False, True], ids=["vmap", "nested vmaps"])
def test_short_numbers_are_summed_in_32_bits(nested, dtype, options):
    """In 16 bits a sum of ones would stop at 2048, or at 256."""
    f = batchrules.device_call(lambda x, y: x * y, **options)
    mapped = jax.vmap(jax.vmap(f, (0, None)), (0, None)) if nested else jax.vmap(f, (0, None))
    xs, y = jnp.ones((2, 2048) if nested else 4096, dtype), jnp.ones((), dtype)
    (result,) = jax.jit(lambda y: jax.vjp(lambda y: mapped(xs, y), y)[1](xs))(y)
    assert result.dtype == dtype
    assert complex(result) == 4096


@every_way
def test_inside_shard_map(options):
    """What a sum starts from varies over the devices as the elements do."""
    f = batchrules.device_call(wave, **options)

    def gradient(f):
        own = jax.grad(total(jax.vmap(f, (0, None))), (0, 1))
        return jax.shard_map(own, mesh=auto("x"), in_specs=(P("x"), P()), out_specs=(P("x"), P()))

    result = jax.jit(gradient(f))(np.tile(XS, (2, 1)), YS[0])
    assert_right_everywhere(result, jax.grad(total(jax.vmap(wave, (0, None))), (0, 1))(np.tile(XS, (2, 1)), YS[0]))


@every_way
def test_constant_cotangents_inside_shard_map(options):
    """An endpoint that answers None, or what does not vary, is no reason to stumble."""
    f = batchrules.device_call(
        lambda x, y: x + jnp.sum(y, axis=-1, keepdims=True),
        vjp=lambda args, cotangent, needed: (cotangent, jnp.ones(args[1].shape)),  # noqa: ARG005
        **options,
    )
    own = jax.grad(lambda x, y: jax.vmap(f, (0, None))(x, y).sum(), 1)
    program = jax.shard_map(own, mesh=auto("x"), in_specs=(P("x"), P()), out_specs=P())
    assert_right_everywhere(jax.jit(program)(np.tile(XS, (2, 1)), YS[0]), np.full(3, 24.0))


@every_way
def test_on_an_explicit_mesh(options):
    f, mesh = batchrules.device_call(wave, **options), explicit("x")
    many = np.tile(XS, (2, 1))
    for mapped, ys in (
        (lambda f: jax.vmap(f, (0, None)), YS[0]),
        (lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)), YS),
    ):
        gradient = lambda f, mapped=mapped: jax.grad(total(mapped(f)), (0, 1))  # noqa: E731
        with using(mesh):
            result = jax.jit(gradient(f))(put(many, mesh, "x"), put(ys, mesh))
        assert_right_everywhere(result, gradient(wave)(many, ys))
