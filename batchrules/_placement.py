"""Where the operands of an opaque call live: replicated elements, varying axes, and the types of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from batchrules import _batch, _jax_versions
from batchrules._batch import Axes, OutAxis


def as_operand(leaf: Any) -> Any:
    """The leaf as a JAX array, whole on every device that takes part."""
    # asarray on a traced value would lose track of in_axes on jax 0.7 and 0.8.
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    spec = getattr(getattr(jax.typeof(array), "sharding", None), "spec", ())
    if all(entry is None for entry in spec):
        return array
    # Opaque code cannot be told that its element is split, and cotangents must have the type of their arguments.
    mesh = jax.typeof(array).sharding.mesh
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*([None] * array.ndim))))


def aligned(operands: Sequence[Any]) -> list[Any]:
    """The operands, cast to vary over the union of the axes that any of them varies over.

    Without it the gradient of an unvarying argument under `jax.shard_map` would silently miss its sum over devices.
    """
    axes = frozenset[Any]().union(*(_jax_versions.varying_axes(jax.typeof(operand)) for operand in operands))
    if not axes:
        return list(operands)
    return [_jax_versions.cast_varying(operand, axes) for operand in operands]


def output_type(avals: Sequence[Any], axes: Axes, output: int, element: tuple[int, ...], dtype: Any) -> Any:
    """The type of an output: the recorded axes in front, sharded as they are, varying as the operands do."""
    spec = tuple(axis.mesh_axis for axis in _batch.output_axes(axes, output)) + (None,) * len(element)
    return _jax_versions.result_type(_typical(avals), _batch.output_shape(axes, output, element), dtype, spec)


def _typical(avals: Sequence[Any]) -> Any:
    """The operand whose type says most: one on a mesh, if there is one."""
    if not avals:
        return None
    on_mesh = (aval for aval in avals if not aval.sharding.mesh.empty)
    return next(on_mesh, avals[0])


def argument_spec(axes: Axes, argument: int) -> PartitionSpec:
    """How an argument that comes with its mapped axes in front is split over the recorded mesh axes."""
    return PartitionSpec(*(axis.mesh_axis for axis in _batch.argument_axes(axes, argument)))


def output_spec(axes: Axes, output: int) -> PartitionSpec:
    """How an output is split over the recorded mesh axes."""
    return PartitionSpec(*(axis.mesh_axis for axis in _batch.output_axes(axes, output)))


def is_sharded(axes: Axes) -> bool:
    """Whether an Explicit mesh axis shards any of the recorded axes."""
    return any(axis.mesh_axis is not None for axis in axes)


def local_axes(axes: Axes, mesh: Any) -> Axes:
    """The recorded axes as one device of the mesh sees them."""
    return _batch.localised(axes, [_parts(axis.mesh_axis, mesh) for axis in axes])


def _parts(mesh_axis: Any, mesh: Any) -> int:
    parts = 1
    for name in mesh_names(mesh_axis):
        parts *= mesh.shape[name]
    return parts


def mesh_names(mesh_axis: Any) -> tuple[Any, ...]:
    """The names in a mesh axis entry, which is None, a name, or a tuple of names."""
    if mesh_axis is None:
        return ()
    return tuple(mesh_axis) if isinstance(mesh_axis, tuple | list) else (mesh_axis,)


def summed_over_devices(array: Any, axes: Axes, output: int) -> Any:
    """The sum over the devices, each of which has a part of an axis that an output is summed over."""
    summed = [axis.mesh_axis for axis in axes if axis.output(output) is OutAxis.SUMMED]
    names = tuple(name for mesh_axis in summed for name in mesh_names(mesh_axis))
    return jax.lax.psum(array, names) if names else array


def like(values: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The values, cast to vary over the axes that the others vary over."""
    return [
        _jax_versions.cast_varying(value, _jax_versions.varying_axes(jax.typeof(other)))
        for value, other in zip(values, others, strict=True)
    ]
