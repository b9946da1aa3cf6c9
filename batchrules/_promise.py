"""What `result_shape` promises: the outputs of one element, checked as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _jax_versions, _trees
from batchrules._recording import Result
from batchrules._schema import ArraySpec


def promised(shapes: Any, where: str) -> tuple[tuple[Result, ...], _trees.Structure]:
    """The outputs that were promised, by path."""
    leaves, tree = _trees.flatten(shapes)
    paths = _trees.paths(shapes)
    return tuple(_result(leaf, path, where) for leaf, path in zip(leaves, paths, strict=True)), tree


def _result(leaf: Any, path: str, where: str) -> Result:
    place = f"{where}: result_shape[{path!r}]" if path else f"{where}: result_shape"
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"{place} is {leaf!r} of type {type(leaf).__name__}, which has no shape and dtype. Use "
            "jax.ShapeDtypeStruct(shape, dtype)."
        )
    return Result(path, _promised_shape(leaf.shape, place), _promised_dtype(leaf.dtype, place), _differentiable(leaf))


def _differentiable(leaf: Any) -> bool:
    return leaf.differentiable if isinstance(leaf, ArraySpec) else True


def _promised_shape(shape: Any, place: str) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Iterable) else None
    if sizes is None or not all(isinstance(size, int | np.integer) and size >= 0 for size in sizes):
        raise ValueError(
            f"{place} promises the shape {shape!r}. A shape is a tuple of whole numbers from 0; where it depends on "
            "the arguments, let result_shape be a function of them."
        )
    return tuple(int(size) for size in sizes)


def _promised_dtype(dtype: Any, place: str) -> np.dtype[Any]:
    if _is_extended(dtype):
        raise TypeError(f"{place} promises {dtype}, which NumPy cannot hold; promise its key data.")
    promised = _numpy_dtype(dtype)
    if promised is None or not _trees.jax_can_hold(promised):
        raise TypeError(f"{place} promises the dtype {dtype!r}, which JAX cannot hold; promise a number or a bool.")
    canonical = _jax_versions.canonical_dtype(promised)
    if canonical != promised:
        raise ValueError(
            f"{place} promises {promised}, but 64-bit types are off in JAX. Promise {canonical}, or turn them on: "
            "jax.config.update('jax_enable_x64', True)."
        )
    return promised


def _is_extended(dtype: Any) -> bool:
    return not isinstance(dtype, str) and dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)


def _numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    if dtype is None:
        return None  # np.dtype(None) would be float64
    try:
        return np.dtype(dtype)
    except TypeError:
        return None
