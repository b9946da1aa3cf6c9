"""The host primitive: what JAX knows of a host call. Its vmap rule computes nothing; it records the axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching, mlir, xla

from batchrules import _linear_rules, _operands, _recording
from batchrules._batch import Axes
from batchrules._host_site import HostSite
from batchrules._jax_versions import Primitive
from batchrules._methods import HOST_METHODS

host_call_p = Primitive("batchrules_host_call")
host_call_p.multiple_results = True


host_call_p.def_abstract_eval(_recording.output_types)


def _record_axis(
    axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None], *, site: HostSite, axes: Axes
) -> tuple[Any, Any]:
    if all(dim is None for dim in dims):
        return _recording.bind_unmapped(host_call_p, operands, site=site, axes=axes)
    if site.request.method is None and any(dim is not None for dim in dims[: len(dims) - site.linear]):
        ways = f"Choose one of {', '.join(repr(name) for name in HOST_METHODS)}."
        raise NotImplementedError(
            f"{site.name}: jax.vmap needs a method, and none was given. {site.remedy('method', ways)}"
        )
    mapped = _recording.mapped_operands(axis_data, operands, dims)
    return _recording.bind_recorded(host_call_p, mapped, site=site, axes=axes)


batching.fancy_primitive_batchers[host_call_p] = _record_axis


@host_call_p.def_impl
def _run_eagerly(*operands: Any, site: HostSite, axes: Axes) -> Sequence[Any]:
    devices = _devices(operands)
    if len(devices) > 1:
        return xla.apply_primitive(host_call_p, *operands, site=site, axes=axes)
    # One device: run at once. The user sees the original exception, and nothing is compiled and kept.
    # As JAX would hold them: under jax.jvp, a Python number comes as it is.
    arrays = [_operands.as_numpy(operand) for operand in operands]
    # What runs a batch is loaded with the first one: an import of batchrules need not wait for it.
    from batchrules._host_runners import runner  # noqa: PLC0415

    outputs = runner(site, axes, [array.shape for array in arrays])(*arrays)
    return [_on_device(output, devices) for output in outputs]


def _devices(operands: Sequence[Any]) -> set[Any]:
    """The devices that take part: an array on one device, not committed to it, goes where the others are."""
    arrays = [operand for operand in operands if isinstance(operand, jax.Array)]
    bound = [array for array in arrays if array.committed or len(array.devices()) > 1]
    return {device for array in bound or arrays for device in array.devices()}


def _on_device(output: np.ndarray[Any, Any], devices: set[Any]) -> jax.Array:
    # A copy, because the array may be a buffer that the function goes on using.
    # Waited for, because up to jax 0.10 the copy is made later.
    array = jnp.array(output).block_until_ready()
    if devices and array.devices() != devices:
        return jax.device_put(array, next(iter(devices)))
    return array


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, site: HostSite, axes: Axes) -> Sequence[Any]:
    from batchrules import _host_lowering  # noqa: PLC0415  # as above

    return _host_lowering.lower(ctx, *operands, site=site, axes=axes)


_linear_rules.install(host_call_p)
mlir.register_lowering(host_call_p, _lower)
