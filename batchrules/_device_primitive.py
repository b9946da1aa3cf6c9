"""The device primitive: its vmap rule records the axis, its lowering runs the batch, its derivatives are sites too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import batching, mlir, xla

from batchrules import _batch, _jacobian, _linear_rules, _placement, _recording, _rules, _sharded
from batchrules._batch import Axes, OutAxis
from batchrules._device_site import DeviceSite
from batchrules._errors import ResultError
from batchrules._jax_versions import Primitive
from batchrules._methods import Choice
from batchrules._recording import Result

device_call_p = Primitive("batchrules_device_call")
device_call_p.multiple_results = True
device_call_p.def_abstract_eval(_recording.output_types)


def choose(site: DeviceSite, axes: Axes, shapes: Sequence[tuple[int, ...]]) -> Choice:
    """The method for a recorded batch of a call."""
    return _batch.choose_for(site.request, axes, site.paths, shapes)


def execute(site: DeviceSite, axes: Axes, *operands: Any) -> list[Any]:
    """Run a recorded batch in JAX operations, where its data lives."""
    if not _placement.is_sharded(axes):
        return _execute_local(site, axes, axes, operands)
    run_batch = partial(_execute_local, site, axes)
    return _sharded.per_shard(run_batch, axes, operands, len(site.results))


def _execute_local(site: DeviceSite, axes: Axes, local: Axes, operands: Sequence[Any]) -> list[Any]:
    if _jacobian.serves(site, local):
        return _by_jacobian(site, axes, local, operands)
    outputs = _run(site, local, operands, site.batch_size)
    return [_kept(_rules.with_all_axes(output, local), axes, j) for j, output in enumerate(outputs)]


def _by_jacobian(site: DeviceSite, axes: Axes, local: Axes, operands: Sequence[Any]) -> list[Any]:
    fixed = len(operands) - site.linear
    of = _jacobian.jacobian_site(site, local, operands)
    primal_axes = _jacobian.primal_axes(site, local)
    blocks = [_rules.with_all_axes(b, primal_axes) for b in _run(of, primal_axes, operands[:fixed], of.batch_size)]
    for block, result in zip(blocks, of.results, strict=True):
        _check_block(block, result, primal_axes, of.name)
    outputs = _jacobian.contracted(jnp, site, local, blocks, operands[fixed:])
    return [_placement.summed_over_devices(output, axes, position) for position, output in enumerate(outputs)]


def _check_block(block: Any, result: Result, axes: Axes, where: str) -> None:
    expected = (*_batch.sizes(axes), *result.shape)
    if block.shape != expected or block.dtype != result.dtype:
        raise ResultError(
            f"{where}: the jacobian endpoint's block {result.path!r} is {block.dtype}{list(block.shape)}, expected "
            f"{result.dtype}{list(expected)}."
        )


def _run(site: DeviceSite, axes: Axes, operands: Sequence[Any], batch_size: int | None) -> list[_rules.Output]:
    choice = choose(site, axes, [tuple(operand.shape) for operand in operands])
    plan = _rules.Plan(choice, batch_size, site.name, site.results)
    return _rules.run(lambda leaves, size: site.body(*leaves, size=size), axes, operands, plan)


def _kept(array: Any, axes: Axes, output: int) -> Any:
    """An output that has all axes but those that it is summed over, with those alone that it keeps."""
    present = [axis for axis in axes if axis.output(output) is not OutAxis.SUMMED]
    for position in reversed(range(len(present))):
        if present[position].output(output) is OutAxis.ABSENT:
            array = lax.index_in_dim(array, 0, position, keepdims=False)
    return _placement.summed_over_devices(array, axes, output)


def _record_axis(
    axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None], *, site: DeviceSite, axes: Axes
) -> tuple[Any, Any]:
    if all(dim is None for dim in dims):
        return _recording.bind_unmapped(device_call_p, operands, site=site, axes=axes)
    _refuse_collective(site, axis_data.name)
    mapped = _recording.mapped_operands(axis_data, operands, dims)
    axis = replace(mapped.axis, outputs=_what_depends(site, mapped, axes))
    return _recording.bind_recorded(device_call_p, replace(mapped, axis=axis), site=site, axes=axes)


batching.fancy_primitive_batchers[device_call_p] = _record_axis


def _refuse_collective(site: DeviceSite, axis_name: Any) -> None:
    if axis_name in site.axis_names:
        raise TypeError(
            f"{site.name} has a collective over the axis {axis_name!r}, along which jax.vmap maps it. It is batched as "
            "a whole, so it cannot see its neighbours: take the collective out of the function."
        )


def _what_depends(site: DeviceSite, mapped: _recording.MappedOperands, axes: Axes) -> tuple[OutAxis, ...] | None:
    """For each output, whether it depends on a new axis; None for: all do.

    Only under `expand_dims` does a function tell, by leading with 1; it is traced once more for that.
    Derivatives are left alone: JAX traces a jvp on its way to a vjp, where there may be none.
    """
    if site.linear or _placement.is_sharded((mapped.axis, *axes)) or _batch.count((mapped.axis, *axes)) == 0:
        return None
    all_axes = (mapped.axis, *axes)
    if (
        choose(site, all_axes, [tuple(x.shape) for x in mapped.operands]).method != "expand_dims"
        or site.batch_size == 1
    ):
        return None
    most = site.batch_size or max(2, mapped.axis.size)
    probe = replace(mapped.axis, size=min(max(2, mapped.axis.size), most))
    depends: list[bool] = []

    def trace(*operands: Any) -> list[Any]:
        elements = [
            _along_one_axis(x, len(_batch.argument_axes(axes, i)), probe.size)
            if probe.in_batched[i]
            else _first(x, len(_batch.argument_axes(axes, i)))
            for i, x in enumerate(operands)
        ]
        outputs = _run(site, (probe,), elements, None)
        depends.extend(output.batched for output in outputs)
        return [output.array for output in outputs]

    jax.eval_shape(trace, *mapped.operands)
    return tuple(OutAxis.KEPT if is_batched else OutAxis.ABSENT for is_batched in depends)


def _first(array: Any, lead: int) -> Any:
    """The first element along so many leading axes."""
    return array[(0,) * lead]


def _along_one_axis(array: Any, inner: int, size: int) -> Any:
    """The first element along the inner axes, for so many of the outermost; a single one twice."""
    kept = array[(slice(None), *(0,) * inner)]
    return lax.concatenate([kept, kept], 0) if kept.shape[0] < size else kept[:size]


@device_call_p.def_impl
def _run_eagerly(*operands: Any, site: DeviceSite, axes: Axes) -> Sequence[Any]:
    return xla.apply_primitive(device_call_p, *operands, site=site, axes=axes)


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, site: DeviceSite, axes: Axes) -> Sequence[Any]:
    return mlir.lower_fun(partial(execute, site, axes))(ctx, *operands)


mlir.register_lowering(device_call_p, _lower)
_linear_rules.install(device_call_p)
