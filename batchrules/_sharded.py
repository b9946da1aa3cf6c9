"""A mapped axis that an Explicit mesh axis shards: each device executes the elements that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from batchrules import _jax_versions, _placement
from batchrules._batch import Axes
from batchrules._rules import Output

RunBatch = Callable[[Axes, Sequence[Any]], list[Output]]


def run(run_batch: RunBatch, axes: Axes, arrays: Sequence[Any]) -> list[Output]:
    """Execute a batch where it lives: as it is, or once per shard of the recorded mesh axes."""
    if not _placement.is_sharded(axes):
        return run_batch(axes, arrays)
    return [Output(array, batched=True) for array in _per_shard(run_batch, axes, arrays)]


def _per_shard(run_batch: RunBatch, axes: Axes, arrays: Sequence[Any]) -> Sequence[Any]:
    mesh = next(jax.typeof(x).sharding.mesh for x in arrays if not jax.typeof(x).sharding.mesh.empty)
    names = {name for axis in axes for name in _placement.mesh_names(axis.mesh_axis)}
    local = _placement.local_axes(axes, mesh)

    def one_device(*shards: Any) -> list[Any]:
        outputs = run_batch(local, _placement.aligned(shards))
        return [_with_all_axes(output, local) for output in outputs]

    # An output that depends on no mapped argument is repeated: its type varies over the devices all the same.
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=tuple(_placement.argument_spec(axes, i) for i in range(len(arrays))),
        out_specs=_placement.output_spec(axes, 0),
        axis_names=names,
    )(*arrays)


def _with_all_axes(output: Output, axes: Axes) -> Any:
    if output.batched:
        return output.array
    return jax.lax.broadcast(output.array, [axis.size for axis in axes])
