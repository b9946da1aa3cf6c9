"""The ways a host call runs in a compiled program: on one device, once for several devices, or once per shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from batchrules import _callbacks, _host_leader, _jax_versions, _placement
from batchrules._batch import Axes
from batchrules._errors import ExportError
from batchrules._host_runners import runner
from batchrules._host_site import HostSite
from batchrules._surroundings import Surroundings

_DEVICES = "batchrules_devices"


def lower(ctx: mlir.LoweringRuleContext, *operands: Any, site: HostSite, axes: Axes) -> Sequence[Any]:
    """The lowering rule of the host primitive."""
    _refuse_export(ctx, site)
    avals: Sequence[Any] = ctx.avals_in
    span = _span(ctx, avals)
    if span is None:
        is_shard = isinstance(ctx.module_context.axis_context, mlir.SPMDAxisContext)
        around = Surroundings(compiled=True, shard=is_shard)
        return _callbacks.emit(ctx, runner(site, axes, [aval.shape for aval in avals], around), operands)
    return mlir.lower_fun(partial(_run_over, span, site, axes))(ctx, *operands)


def _refuse_export(ctx: mlir.LoweringRuleContext, site: HostSite) -> None:
    if _jax_versions.is_export(ctx):
        raise ExportError(
            f"{site.name} cannot be exported with jax.export: an exported program has no Python to call the host "
            "function with. Export the parts around it, or replace it by jax.ffi.ffi_call to compiled code."
        )


@dataclass(frozen=True)
class Span:
    """The devices that must agree on who calls: a mesh, and its axes that are not manual already."""

    mesh: Any
    free: tuple[Any, ...]


def _span(ctx: mlir.LoweringRuleContext, avals: Sequence[Any]) -> Span | None:
    """The devices that run the same program; None where each device calls for itself."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.ShardingContext):
        if context.num_devices == 1:
            return None
        mesh = _mesh_in_use(avals, AbstractMesh((context.num_devices,), (_DEVICES,), axis_types=(AxisType.Auto,)))
        return Span(mesh, mesh.axis_names)
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes
        mesh = _mesh_in_use(avals, context.mesh.abstract_mesh)
        mesh = mesh.update_axis_types(dict.fromkeys(manual, AxisType.Manual))
        free = tuple(name for name in mesh.axis_names if name not in manual)
        return Span(mesh, free) if free else None
    return None


def _mesh_in_use(avals: Sequence[Any], otherwise: AbstractMesh) -> AbstractMesh:
    """The mesh that the operands or the surrounding program are typed with."""
    typed = [aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty]
    around = jax.sharding.get_abstract_mesh()
    return next(iter(typed), otherwise if around.empty else around)


def _run_over(span: Span, site: HostSite, axes: Axes, *operands: Any) -> Sequence[Any]:
    """Each shard along a recorded mesh axis calls for itself, and of the devices that share a shard only one."""
    recorded = {name for axis in axes for name in _placement.mesh_names(axis.mesh_axis)}
    team = _host_leader.Team(span.mesh, tuple(name for name in span.free if name not in recorded), span.free)
    return jax.shard_map(
        partial(_host_leader.call, site, axes, team),
        mesh=span.mesh,
        in_specs=(
            PartitionSpec(team.sharing),
            *(_placement.argument_spec(axes, i) for i in range(len(operands))),
        ),
        out_specs=[_placement.output_spec(axes, output) for output in range(len(site.results))],
        axis_names=set(span.free),
        check_vma=False,
    )(_ranks(span.mesh, team.sharing), *operands)


def _ranks(mesh: AbstractMesh, sharing: tuple[Any, ...]) -> jax.Array:
    """Numbers to hand out to the devices that share data; `axis_index` fails in nested shard_maps before jax 0.9."""
    ranks = jnp.arange(math.prod(mesh.shape[name] for name in sharing), dtype=jnp.int32)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = tuple(name for name in sharing if types[name] == AxisType.Explicit)
    return jax.sharding.reshard(ranks, NamedSharding(mesh, PartitionSpec(explicit))) if explicit else ranks
