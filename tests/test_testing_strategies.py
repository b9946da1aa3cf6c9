"""The strategies make every kind of array, axis, batch and schema that they promise."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import batchrules
from batchrules.testing import arrays, axes, batches, in_axes, schemas

FEW = settings(max_examples=25)


def is_found(strategy, condition):
    return condition(find(strategy, condition, settings=settings(max_examples=2000, database=None)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "complex64", "int32", "uint8", "bool"])
def test_every_dtype(dtype):
    assert is_found(arrays(), lambda x: x.dtype == jnp.dtype(dtype) and x.size > 1)


@pytest.mark.parametrize("condition", [lambda x: x.ndim == 0, lambda x: x.size == 0, lambda x: x.ndim == 2])
def test_every_kind_of_shape(condition):
    assert is_found(arrays(), condition)


@FEW
@given(arrays())
def test_numbers_are_small_and_finite(x):
    assert np.isfinite(x.astype("complex128")).all()
    assert np.abs(x.astype("complex128")).max(initial=0) <= 16


@FEW
@given(arrays("bfloat16", (4, 5)))
def test_sums_are_exact(x):
    assert x.shape == (4, 5)
    assert jnp.asarray(x).dtype == "bfloat16"
    np.testing.assert_array_equal(x.astype("float64") * 4, np.round(x.astype("float64") * 4))


@FEW
@given(arrays(st.sampled_from(["int32", "bool"]), st.sampled_from([(2,), ()])))
def test_dtypes_and_shapes_by_strategies(x):
    assert x.dtype in {np.dtype("int32"), np.dtype("bool")}
    assert x.shape in {(2,), ()}


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -2, -3])
def test_every_axis(axis):
    assert is_found(axes(2), lambda drawn: drawn == axis)


@FEW
@given(axes(1, optional=False))
def test_axes_that_are_mapped(axis):
    assert axis in range(-2, 2)


def test_axes_of_what_is_no_rank():
    with pytest.raises(TypeError, match="ndim must be an int"):
        axes("2")
    with pytest.raises(ValueError, match="at least 0; got -1"):
        axes(-1)


ARGS = (np.zeros((2, 3)), np.zeros(()), np.zeros(3, "int32"))


@FEW
@given(in_axes(ARGS))
def test_in_axes_fit(chosen):
    assert any(axis is not None for axis in chosen)
    for axis, arg in zip(chosen, ARGS, strict=True):
        assert axis is None or -arg.ndim - 1 <= axis <= arg.ndim


@pytest.mark.parametrize("mapped", [(True, False, False), (False, True, False), (False, False, True), (True,) * 3])
def test_every_choice_of_mapped_arguments(mapped):
    assert is_found(in_axes(ARGS), lambda chosen: tuple(axis is not None for axis in chosen) == mapped)


def test_in_axes_of_nothing():
    with pytest.raises(ValueError, match="no arguments"):
        in_axes([])


@FEW
@given(batches(*ARGS))
def test_batches_are_what_vmap_takes(batch):
    result = jax.vmap(lambda x, s, n: (x * s, n + n), batch.in_axes)(*batch.arguments)
    assert result[0].shape == (batch.size, 2, 3)
    for index in range(batch.size):
        x, s, n = batch.element(index)
        np.testing.assert_array_equal(result[0][index], x * s)
        np.testing.assert_array_equal(result[1][index], n + n)


@pytest.mark.parametrize("size", [0, 1, 4])
def test_every_size(size):
    assert is_found(batches(*ARGS), lambda batch: batch.size == size)


@FEW
@given(batches(np.float32(1), sizes=st.just(7)))
def test_sizes_by_a_strategy(batch):
    assert batch.arguments[0].shape == (7,)


def test_a_batch_of_what_is_no_array():
    with pytest.raises(TypeError, match="argument 0 must be an array or a number; got a str"):
        batches("x")


SPEC = {
    "a lead": lambda spec: spec.any_rank and len(spec.shape) > 1,
    "no lead": lambda spec: not spec.any_rank,
    "0-d": lambda spec: spec.shape == (),
    "a free dimension": lambda spec: None in spec.shape,
    "a dimension of size 0": lambda spec: 0 in spec.shape,
    "a dtype": lambda spec: spec.dtype is not None,
    "any dtype": lambda spec: spec.dtype is None,
    "no derivatives": lambda spec: not spec.differentiable,
}


@pytest.mark.parametrize("condition", SPEC.values(), ids=SPEC)
def test_every_kind_of_spec(condition):
    assert is_found(schemas(), lambda schema: any(map(condition, schema.values())))


@FEW
@given(schemas(["x", "params.w"]))
def test_schemas_of_given_paths(schema):
    assert isinstance(schema, batchrules.Schema)
    assert set(schema) == {"x", "params.w"}


def test_without_hypothesis_the_checks_work():
    """And a strategy says what to install."""
    program = """
import sys
sys.modules["hypothesis"] = None
import batchrules.testing
try:
    batchrules.testing.arrays()
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.strip() == (
        "the strategies of batchrules.testing need Hypothesis: pip install 'batchrules[testing]'"
    )
