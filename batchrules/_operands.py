"""The arrays of a call, made ready for a primitive, and checked against the schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _jax_versions, _placement
from batchrules._schema import Schema, Signature
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
    """The leaf as a read-only NumPy array of the dtype that JAX would hold it in."""
    array = as_read_only(leaf)
    dtype = _jax_versions.canonical_dtype(array.dtype)
    return array if array.dtype == dtype else as_read_only(array.astype(dtype))


def as_read_only(leaf: Any) -> np.ndarray[Any, Any]:
    """The leaf as a read-only NumPy array that its owner cannot change: a copy of one that is NumPy's."""
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError("JAX has no masks: pass array.filled(value) instead of a masked array, and the mask beside it.")
    array = np.array(leaf) if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    array.flags.writeable = False
    return array


def check_signature(signature: Signature | None, arguments: int, results: int, where: str) -> None:
    """Raise if a gufunc signature describes other numbers of arrays than the call has."""
    if signature is None:
        return
    for what, described, there in (
        ("array arguments", len(signature.inputs), arguments),
        ("results", len(signature.outputs), results),
    ):
        if described != there:
            raise ValueError(
                f"{where}: the signature {signature.text!r} describes {described} {what}, but the call has {there}."
            )


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
        expected = None if spec.dtype is None else _jax_versions.canonical_dtype(spec.dtype)
        if expected is not None and expected != operand.dtype:
            raise TypeError(
                f"{where}: the argument {path!r} has dtype {operand.dtype}, but the schema takes {expected}. "
                f"Convert it with .astype({expected.name!r}), or mend the schema."
            )
