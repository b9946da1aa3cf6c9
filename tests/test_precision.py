"""What is told of a dtype without `finfo` is what `finfo` tells."""

import jax.numpy as jnp
import numpy as np
import pytest

from batchrules import _precision


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"])
def test_precision_agrees_with_finfo(name):
    dtype = jnp.dtype(name)
    assert _precision.epsilon(dtype) == float(jnp.finfo(dtype).eps)
    assert _precision.bits(dtype) == jnp.finfo(np.zeros((), dtype).real.dtype).bits
