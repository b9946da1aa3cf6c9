"""A mapped axis that is spread over devices: each device chunks its own part, and the results lie as the inputs do.

Such an axis is laid out as one block for each device, and every chunk takes a part of each block, so slicing moves
nothing from device to device. On an Explicit mesh the sharding is part of the type. On an Auto mesh only the
compiler knows it; the layout suits it whatever it is, because a device holds whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, get_abstract_mesh, reshard

from batchrules._bmap_axes import Arguments
from batchrules._jax_versions import cast_varying, varying_axes


def axis_sharding(arguments: Arguments) -> NamedSharding | None:
    """How the mapped axis is explicitly sharded, as the sharding of an array whose first axis it is."""
    for x, axis in arguments.mapped_pairs:
        sharding = jax.typeof(x).sharding
        if len(sharding.spec) > axis and sharding.spec[axis] is not None:
            return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[axis]))
    return None


def num_shards(over: NamedSharding | None) -> int:
    """The number of devices that hold a part each of an axis that is sharded so."""
    if over is None:
        return 1
    return math.prod(over.mesh.shape[name] for name in _names(*over.spec))


def divided_over(x: Any, size: int, over: NamedSharding) -> Any:
    """`size` copies of an array along a new first axis, which is sharded so."""
    return reshard(lax.broadcast(x, (size,)), over)


def num_auto_devices() -> int:
    """The number of devices that the compiler may spread an axis over, as it likes."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    types = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in types if kind == AxisType.Auto)


def is_placed_explicitly(x: Any) -> bool:
    """Whether an array's type says on which devices its parts lie."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def placed_like(values: Sequence[Any], types: Sequence[Any]) -> list[Any]:
    """The values, laid out along the same mesh axes as arrays of these types.

    Axes of an array that are whole in its type may be spread over the mesh axes that are left.
    """
    return [_placed(x, kind) for x, kind in zip(values, types, strict=True)]


def _placed(x: Any, kind: Any) -> Any:
    spec, own = kind.sharding.spec, jax.typeof(x).sharding.spec
    if any(entry is not None for entry in spec) and own != spec:
        wanted = _at_least(spec, own)
        x = x if wanted == own else reshard(x, NamedSharding(kind.sharding.mesh, wanted))
    return cast_varying(x, varying_axes(kind))


def _at_least(spec: PartitionSpec, own: PartitionSpec) -> PartitionSpec:
    taken = {name for entry in spec for name in _names(entry)}
    pairs = zip(spec, own, strict=True)
    return PartitionSpec(*(now if then is None and taken.isdisjoint(_names(now)) else then for then, now in pairs))


def _names(entry: Any) -> tuple[Any, ...]:
    """The mesh axes that an axis with this entry in its spec is spread over."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def plain_type(kind: Any) -> jax.ShapeDtypeStruct:
    """This shape and dtype, and no word of where it lies."""
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype)


def whole_along_first(x: Any) -> Any:
    """An array whose first axis is explicitly sharded, with all of that axis on each device; the others as they are."""
    sharding = jax.typeof(x).sharding
    return reshard(x, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))


def spread_along_first(x: Any, over: NamedSharding) -> Any:
    """An array, its first axis spread over devices as `over` says, if it is not spread yet; the others as they are."""
    spec = jax.typeof(x).sharding.spec
    return x if spec[0] is not None else reshard(x, NamedSharding(over.mesh, PartitionSpec(*over.spec, *spec[1:])))
