"""Every dtype passes through every method unchanged, with 64-bit types on and off."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import ENTRIES, ENTRIES_AND_METHODS, WEAVE, Foreign, assert_same, expected_calls, made
from x64 import x64

import batchrules

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip
NARROW = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
SPECIAL = {"f": [np.nan, np.inf, -np.inf, -0.0], "c": [np.nan, complex(np.inf, -1), complex(0, np.nan), -0.0]}


def values(dtype, count, seed):
    """Values at the edges of the dtype, then whole numbers."""
    dtype = jnp.dtype(dtype)
    if dtype.kind == "b":
        return np.random.default_rng(seed).integers(0, 2, count).astype(bool)
    if dtype.kind in "iu":
        special = [np.iinfo(dtype).min, np.iinfo(dtype).max]
    else:
        special = SPECIAL["c" if dtype.kind == "c" else "f"]
    plain = np.random.default_rng(seed).integers(0, 100, count - len(special))
    return np.concatenate([np.array(special, dtype), plain.astype(dtype)])


def for_every_dtype(call):
    """One program with a mapped call for each dtype."""
    return lambda args: {dtype: jax.vmap(call, (0, None))(*pair) for dtype, pair in args.items()}


@pytest.mark.parametrize(("entry", "method"), ENTRIES_AND_METHODS)
def test_every_dtype(entry, method):
    args = {dtype: (values(dtype, 12, 0).reshape(4, 3), values(dtype, 12, 1)[5:8]) for dtype in DTYPES}
    with made(entry, WEAVE, method) as foreign:
        result = foreign.run(jax.jit(for_every_dtype(foreign.call)), args)
    for dtype in DTYPES:
        assert result[dtype].dtype == jnp.dtype(dtype)
        assert_same(result[dtype], jax.vmap(WEAVE.twin, (0, None))(*args[dtype]))
    assert foreign.log.count == len(DTYPES) * expected_calls(method, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_dtype_outside_jit_and_with_chunks(entry, dtype):
    args = [values(dtype, 15, 0).reshape(5, 3), values(dtype, 15, 1).reshape(5, 3)]
    with made(entry, WEAVE, "expand_dims", batch_size=2) as foreign:
        result = foreign.run(jax.vmap(foreign.call), *args)
    assert_same(result, jax.vmap(WEAVE.twin)(*args))


def _mixed(xp, integer, real, flag):
    return {
        "flag": xp.logical_not(flag),
        "integer": -integer,
        "real": xp.where(flag, real, integer.astype(real.dtype)),
    }


MIXED = Foreign("mixed", _mixed, ((3,), (3,), (3,)))


@pytest.mark.parametrize("real", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("entry", "method"), ENTRIES_AND_METHODS)
def test_arguments_of_different_dtypes(entry, method, real):
    args = [values("int8", 6, 0).reshape(2, 3), values(real, 7, 1)[4:7], values("bool", 6, 2).reshape(2, 3)]
    args[0][0, 0] = 5  # -128 has no negative
    with made(entry, MIXED, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, (0, None, 0))), *args)
    assert_same(result, jax.vmap(MIXED.twin, (0, None, 0))(*args))


@pytest.mark.parametrize(
    ("entry", "method"),
    [("host", "sequential"), ("host", "expand_dims"), ("device", "broadcast_all"), ("register", "sequential")],
)
def test_64_bits_off(entry, method):
    """Data in 64 bits becomes data in 32 before any foreign code sees it, as everywhere in JAX."""
    seen = set()

    def remembered(xp, x, y):
        seen.add(x.dtype)
        return WEAVE.function(xp, x, y)

    args = {}
    for dtype in DTYPES:
        x, y = (values(NARROW.get(dtype, dtype), 12, seed).astype(dtype) for seed in (0, 1))
        args[dtype] = x.reshape(4, 3), y[5:8]
    with x64(enabled=False), made(entry, Foreign("weave", remembered, WEAVE.shapes), method) as foreign:
        result = jax.block_until_ready(jax.jit(for_every_dtype(foreign.call))(args))
        wanted = {dtype: jax.vmap(WEAVE.twin, (0, None))(*pair) for dtype, pair in args.items()}
    for dtype in DTYPES:
        assert result[dtype].dtype == jnp.dtype(NARROW.get(dtype, dtype))
        assert_same(result[dtype], wanted[dtype])
    assert seen == {array.dtype for array in result.values()}


def test_64_bit_result_with_64_bits_off_is_refused():
    with (
        x64(enabled=False),
        pytest.raises(ValueError, match=r"result_shape promises float64, but 64-bit types are off"),
    ):
        batchrules.host_call(np.sum, jax.ShapeDtypeStruct((), "float64"))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_weakly_typed_argument_gives_a_strong_result(entry):
    """A Python number is float64 here, and what foreign code returns is what it says it is."""
    with made(entry, Foreign("same", lambda xp, x: x + 1, ((),)), "expand_dims") as foreign:  # noqa: ARG005
        results = jax.jit(foreign.call)(1.0), jax.vmap(foreign.call)(jnp.arange(2.0))
    assert [(r.dtype, r.weak_type) for r in results] == [(jnp.dtype("float64"), False)] * 2


def test_in_a_process_that_never_turned_64_bits_on():
    """The suite turns them on; most programs do not."""
    program = """
        import jax, numpy as np, batchrules
        shape = jax.ShapeDtypeStruct((), "float32")
        host = batchrules.host_call(lambda x, n: x * n.astype(x.dtype), shape, method="expand_dims")
        device = batchrules.device_call(lambda x, n: x * n, method="expand_dims")
        xs, ns = np.arange(3.0), np.arange(3)
        for call in (host, device):
            result = jax.jit(jax.vmap(call))(xs, ns)
            assert result.dtype == "float32", result.dtype
            np.testing.assert_array_equal(result, xs * ns)
            gradient = jax.jit(jax.grad(lambda x: jax.vmap(device, (0, None))(x, 2).sum()))(xs)
            np.testing.assert_array_equal(gradient, 2 * np.ones(3))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=Path(__file__).parents[1])
