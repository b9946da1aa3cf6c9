"""A mapped axis that an Explicit mesh axis shards: each device executes the elements that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from batchrules import _placement
from batchrules._batch import Axes

RunBatch = Callable[[Axes, Sequence[Any]], list[Any]]


def per_shard(run_batch: RunBatch, axes: Axes, arrays: Sequence[Any], outputs: int) -> list[Any]:
    """Run a batch once per shard of the recorded mesh axes; `run_batch` is given the axes as one device sees them."""
    mesh = next(jax.typeof(x).sharding.mesh for x in arrays if not jax.typeof(x).sharding.mesh.empty)
    local = _placement.local_axes(axes, mesh)
    return jax.shard_map(
        lambda *shards: run_batch(local, _placement.aligned(shards)),
        mesh=mesh,
        in_specs=tuple(_placement.argument_spec(axes, i) for i in range(len(arrays))),
        out_specs=[_placement.output_spec(axes, output) for output in range(outputs)],
        axis_names={name for axis in axes for name in _placement.mesh_names(axis.mesh_axis)},
    )(*arrays)
