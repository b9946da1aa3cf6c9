"""The arrays of a call, made ready for a primitive, and checked against the schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _jax_versions, _placement
from batchrules._schema import Schema
from batchrules._signature import Call


def as_operands(call: Call, where: str) -> list[Any]:
    """The leaves as JAX arrays that a host function can be given."""
    for leaf, path in zip(call.leaves, call.paths, strict=True):
        if _is_extended(leaf):
            raise TypeError(
                f"{where}: the argument {path!r} is a typed PRNG key ({jax.typeof(leaf)}), which NumPy cannot hold. "
                "Pass its data, jax.random.key_data(key); where JAX runs again, jax.random.wrap_key_data makes a key."
            )
    return [_placement.as_operand(leaf) for leaf in call.leaves]


def _is_extended(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def as_numpy(leaf: Any) -> np.ndarray[Any, Any]:
    """The leaf as a NumPy array of the dtype that JAX would hold it in."""
    array = np.asarray(leaf)
    return array.astype(_jax_versions.canonical_dtype(array.dtype), copy=False)


def check_schema(schema: Schema | None, paths: Sequence[str], operands: Sequence[Any], where: str) -> None:
    """Raise if an array does not fit what the schema says of one element."""
    if schema is None:
        return
    for path, operand in zip(paths, operands, strict=True):
        spec = schema.get(path)
        if spec is None:
            continue
        if not spec.takes(operand.shape):
            raise ValueError(
                f"{where}: the argument {path!r} has shape {tuple(operand.shape)}, but the schema takes {spec}. "
                "Pass such a shape (for one element; jax.vmap adds the batch), or mend the schema."
            )
        if spec.dtype is not None and spec.dtype != operand.dtype:
            raise TypeError(
                f"{where}: the argument {path!r} has dtype {operand.dtype}, but the schema takes {spec.dtype}. "
                f"Convert it with .astype({spec.dtype.name!r}), or mend the schema."
            )
