"""A mapped axis that is spread over devices: each device chunks its own part, and the results lie as the inputs do.

On an Explicit mesh the sharding is part of the type, and the loop runs inside one `jax.shard_map`. On an Auto mesh only the
compiler knows it. There, the axis is laid out as one block for each device, and every chunk takes a part of each block:
wherever the blocks lie, slicing them moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from batchrules._bmap_axes import Arguments, is_none
from batchrules._bmap_program import Program
from batchrules._bmap_reduce import Fold, Reduction


def num_blocks(size: int, batch_size: int, reductions: Sequence[Reduction]) -> int:
    """Into how many blocks to lay out an axis of which the compiler may give each device a part."""
    devices = _num_auto_devices()
    keeps_order = any(isinstance(reduction, Fold) for reduction in reductions)
    return 1 if size % devices or batch_size < devices or keeps_order else devices


def _num_auto_devices() -> int:
    mesh = get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    types = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in types if kind == AxisType.Auto)


@dataclass(frozen=True)
class ShardedAxis:
    """Explicit mesh axes (a name, or several) that a mapped axis is spread over."""

    mesh: Any
    names: Any

    @property
    def names_set(self) -> set[Any]:
        return set(self.names) if isinstance(self.names, tuple) else {self.names}

    @property
    def num_shards(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.names_set)

    def spec(self, axis: int) -> PartitionSpec:
        return PartitionSpec(*[None] * axis, self.names)


def find_sharded_axis(arguments: Arguments) -> ShardedAxis | None:
    """The mesh axes that the mapped axis is explicitly sharded over, if it is."""
    for x, axis in zip(arguments.mapped, arguments.mapped_axes, strict=True):
        sharding = jax.typeof(x).sharding
        if len(sharding.spec) > axis and sharding.spec[axis] is not None:
            return ShardedAxis(sharding.mesh, sharding.spec[axis])
    return None


def run_sharded(
    over: ShardedAxis,
    arguments: Arguments,
    out_axes: Any,
    make_program: Callable[[Arguments], Program],
) -> Any:
    """Run a program on each device's part of the axis. `make_program` makes it, for the arguments of one device."""
    arrays = [isinstance(x, jax.Array) for x in arguments.unmapped]
    found: list[Program] = []

    def on_device(mapped: list[Any], shared: list[Any]) -> Any:
        local = arguments.replace(mapped, _merge(arguments.unmapped, arrays, shared))
        program = make_program(local)
        found.append(program)
        values, states = program.run_to_states(program.element.closed, mapped)
        return _to_specs(program, values), [[x[None] for x in state] for state in states]

    in_specs = ([over.spec(axis) for axis in arguments.mapped_axes], [PartitionSpec()] * sum(arrays))
    out_specs = (_out_specs(over, out_axes), over.spec(0))
    mapped_function = jax.shard_map(
        on_device, mesh=over.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=over.names_set
    )
    mapped = [_resharded(x, over, axis) for x, axis in zip(arguments.mapped, arguments.mapped_axes, strict=True)]
    shared = [_resharded(x, over, None) for x, is_array in zip(arguments.unmapped, arrays, strict=True) if is_array]
    output, states = mapped_function(mapped, shared)
    return _assemble(over, found[-1], output, states)


def _merge(unmapped: Sequence[Any], arrays: Sequence[bool], shared: Sequence[Any]) -> list[Any]:
    values = iter(shared)
    return [next(values) if is_array else x for x, is_array in zip(unmapped, arrays, strict=True)]


def _resharded(x: Any, over: ShardedAxis, axis: int | None) -> Any:
    """The array, spread over these mesh axes along `axis` and along no other."""
    spec = [None if set(_names(entry)) & over.names_set else entry for entry in jax.typeof(x).sharding.spec]
    spec += [None] * (x.ndim - len(spec))
    if axis is not None:
        spec[axis] = over.names
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(over.mesh, PartitionSpec(*spec)))


def _names(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


# A result's axis counted from the end has no spec before the result's rank is known. Such a result leaves the devices with
# its axis in front, and a reduced one is left out: its states leave instead.


def _out_specs(over: ShardedAxis, out_axes: Any) -> Any:
    def spec(axis: Any) -> PartitionSpec:
        return PartitionSpec() if axis is None else over.spec(max(axis, 0))

    return jax.tree.map(spec, out_axes, is_leaf=is_none)


def _to_specs(program: Program, values: dict[int, Any]) -> Any:
    moved = {i: jnp.moveaxis(y, program.element.out_axes[i], 0) if _is_from_end(program, i) else y for i, y in values.items()}
    leaves = [moved.get(i) for i in range(len(program.element.outputs))]
    return jax.tree.unflatten(program.element.treedef, leaves)


def _is_from_end(program: Program, i: int) -> bool:
    axis = program.element.out_axes[i]
    return axis is not None and axis < 0


def _assemble(over: ShardedAxis, program: Program, output: Any, states: Sequence[Sequence[Any]]) -> Any:
    numbers = [i for i in range(len(program.element.outputs)) if i not in program.outputs.reduced]
    values = dict(zip(numbers, jax.tree.leaves(output), strict=True))
    values |= {i: jnp.moveaxis(y, 0, program.element.out_axes[i]) for i, y in values.items() if _is_from_end(program, i)}
    for reduction, state in zip(program.reductions, states, strict=True):
        joined = _joined(over, reduction, state)
        results = program.finish(reduction, joined, program.layout.size * over.num_shards)
        values |= dict(zip(reduction.indices, results, strict=True))
    return program.unflatten(values)


def _joined(over: ShardedAxis, reduction: Reduction, states: Sequence[Any]) -> Sequence[Any]:
    """One state of all devices' states, which lie along axis 0."""
    states = [_resharded(x, over, None) for x in states]
    joined = [x[0] for x in states]
    for device in range(1, over.num_shards):
        joined = reduction.join(joined, [x[device] for x in states])
    return joined
