"""The device primitive: its vmap rule records the axis, its lowering runs the batch, its derivatives are sites too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir, xla

from batchrules import _batch, _derivatives, _placement, _recording, _rules, _sharded
from batchrules._batch import Axes, OutAxis
from batchrules._device_site import DeviceSite, fill, select
from batchrules._jax_versions import Primitive
from batchrules._methods import Choice
from batchrules._recording import Result

device_call_p = Primitive("batchrules_device_call")
device_call_p.multiple_results = True
device_call_p.def_abstract_eval(_recording.output_types)


def choose(site: DeviceSite, axes: Axes, shapes: Sequence[tuple[int, ...]]) -> Choice:
    """The method for a recorded batch of a call."""
    return _batch.choose_for(site.request, axes, site.paths, shapes)


def _execute(site: DeviceSite, axes: Axes, *operands: Any) -> list[Any]:
    """Run a recorded batch in JAX operations, where its data lives."""
    if not _placement.is_sharded(axes):
        return _execute_local(site, axes, axes, operands)
    run_batch = partial(_execute_local, site, axes)
    return _sharded.per_shard(run_batch, axes, operands, len(site.results))


def _execute_local(site: DeviceSite, axes: Axes, local: Axes, operands: Sequence[Any]) -> list[Any]:
    outputs = _run(site, local, operands, site.batch_size)
    return [_reduced(_rules.with_all_axes(output, local), axes, j) for j, output in enumerate(outputs)]


def _run(site: DeviceSite, axes: Axes, operands: Sequence[Any], batch_size: int | None) -> list[_rules.Output]:
    choice = choose(site, axes, [tuple(operand.shape) for operand in operands])
    plan = _rules.Plan(choice, batch_size, site.name, site.results)
    return _rules.run(lambda leaves, _: site.body(*leaves), axes, operands, plan)


def _reduced(array: Any, axes: Axes, output: int) -> Any:
    """An output that has all axes, without those that it does not keep."""
    for position in reversed(range(len(axes))):
        axis = axes[position]
        if axis.output(output) is OutAxis.ABSENT:
            array = lax.index_in_dim(array, 0, position, keepdims=False)
        elif axis.output(output) is OutAxis.SUMMED:
            array = jnp.sum(array, position, dtype=array.dtype)
            names = _placement.mesh_names(axis.mesh_axis)
            array = lax.psum(array, names) if names else array
    return array


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
    return mlir.lower_fun(partial(_execute, site, axes))(ctx, *operands)


mlir.register_lowering(device_call_p, _lower)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero) or jax.typeof(tangent).dtype == jax.dtypes.float0


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: DeviceSite, axes: Axes
) -> tuple[Sequence[Any], list[Any]]:
    outputs = device_call_p.bind(*primals, site=site, axes=axes)
    nonzero = [not _is_zero(tangent) for tangent in tangents]
    first_linear = len(primals) - site.linear
    parts = []
    if any(nonzero[first_linear:]):
        # In its tangents or cotangents a derived site is its own derivative.
        moved = [ad.instantiate_zeros(tangent) for tangent in tangents[first_linear:]]
        parts.append(_bind_aligned([*primals[:first_linear], *moved], site, axes))
    if any(nonzero[:first_linear]):
        parts.append(_bind_tangent(primals, tangents, [*nonzero[:first_linear], *[False] * site.linear], site, axes))
    return outputs, _output_tangents(outputs, parts, site)


def _bind_tangent(
    primals: Sequence[Any], tangents: Sequence[Any], nonzero: Sequence[bool], site: DeviceSite, axes: Axes
) -> Sequence[Any]:
    mask = tuple(nonzero)
    derived = _derivatives.tangent_site(site, mask)
    inexact = _derivatives.inexact_outputs(site)
    return _bind_aligned(
        [*primals, *select(tangents, mask)], derived, _derivatives.differentiated_axes(axes, mask, inexact)
    )


def _output_tangents(outputs: Sequence[Any], parts: Sequence[Sequence[Any]], site: DeviceSite) -> list[Any]:
    """The sum of the parts for inexact outputs, zero for the others."""
    summed = iter([sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)])
    inexact = _derivatives.inexact_outputs(site)
    return [
        next(summed) if parts and is_inexact else ad.Zero(jax.typeof(output).to_tangent_aval())
        for output, is_inexact in zip(outputs, inexact, strict=True)
    ]


def _bind_aligned(operands: Sequence[Any], site: DeviceSite, axes: Axes) -> Sequence[Any]:
    return device_call_p.bind(*_placement.aligned(operands), site=site, axes=axes)


ad.primitive_jvps[device_call_p] = _differentiate


def _transpose(cotangents: Sequence[Any], *operands: Any, site: DeviceSite, axes: Axes) -> list[Any]:
    wanted = tuple(ad.is_undefined_primal(operand) for operand in operands)
    seen = [j for j, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)]
    nothing = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
    if not seen:
        return nothing
    primals = len(operands) - site.linear
    transposed = _derivatives.transposed_site(
        site,
        wanted[primals:],
        tuple(j in seen for j in range(len(cotangents))),
        [_as_element(x, axes, i) for i, x in enumerate(operands[:primals])],
    )
    asked = _asked(site, transposed, wanted, primals)
    new_axes = _derivatives.transposed_axes(axes, primals, seen, asked)
    given = [_spread(cotangents[j], axes, j) for j in seen]
    outputs = _bind_aligned([*operands[:primals], *given], transposed, new_axes)
    for operand, output in zip(asked, outputs, strict=True):
        if operand is not None:
            nothing[operand] = output
    return nothing


ad.primitive_transposes[device_call_p] = _transpose


def _asked(site: DeviceSite, transposed: DeviceSite, wanted: Sequence[bool], primals: int) -> list[int | None]:
    """For each output of a transposed site, the operand whose cotangent it is, if that is wanted."""
    linear = range(primals, primals + site.linear)
    if transposed.is_cotangent:
        return [i for i in linear if wanted[i]]
    # A tangent site gives every inexact output of its base; the operands were the cotangents of some of these.
    origin = transposed.origin
    given = site.origin.outputs if site.origin else ()
    operands = fill(given, linear, [None] * len(given))
    inexact = origin.outputs if origin else ()
    return [i if i is not None and wanted[i] else None for i in select(operands, inexact)]


def _as_element(operand: Any, axes: Axes, position: int) -> Result:
    aval = operand.aval if ad.is_undefined_primal(operand) else jax.typeof(operand)
    return Result("", _batch.element_shape(axes, position, aval.shape), aval.dtype)


def _spread(cotangent: Any, axes: Axes, output: int) -> Any:
    """The cotangent of an output, given to the first element only of each axis that the output does not depend on."""
    position = 0
    for axis in axes:
        if axis.output(output) is OutAxis.ABSENT:
            lead = lax.expand_dims(cotangent, (position,))
            padding = [(0, 0, 0)] * lead.ndim
            padding[position] = (0, axis.size - 1, 0)
            cotangent = lax.pad(lead, jnp.zeros((), lead.dtype), padding)
        if axis.output(output) is not OutAxis.SUMMED:
            position += 1
    return cotangent
