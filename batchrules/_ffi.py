"""Adapt the parameters of JAX's own `ffi_call` and `pure_callback` primitives to a leading batch dimension."""

from __future__ import annotations

from typing import Any

from batchrules import _jax_versions
from batchrules._registration import BatchInfo


def ffi_update_params(params: dict[str, Any], batch: BatchInfo) -> dict[str, Any]:
    """Adapt the parameters of `jax.ffi.ffi_call` (or `jax.pure_callback`) to a vectorised bind.

    Results lead with the size of the batch, and the layouts of what leads have the new dimension as the slowest one.

    Args:
        params: The parameters of the unbatched bind.
        batch: What this bind is given.

    Returns:
        The parameters of this bind.

    Example:
        >>> import jax, batchrules
        >>> f = jax.ffi.ffi_call("my_kernel", jax.ShapeDtypeStruct((3,), "float32"), vmap_method="broadcast_all")
        >>> ffi_call_p = jax.make_jaxpr(f)(jax.numpy.zeros(3, "float32")).eqns[0].primitive
        >>> batchrules.register(
        ...     ffi_call_p,
        ...     method=lambda params: params["vmap_method"],
        ...     update_params=batchrules.ffi_update_params,
        ... )
        >>> batchrules.unregister(ffi_call_p)
    """
    avals = [_jax_versions.with_lead(aval, batch.batch_size) for aval in params["result_avals"]]
    updated = {**params, "result_avals": tuple(avals)}
    if params.get("output_layouts") is not None:
        updated["output_layouts"] = tuple(map(_slowest_first, params["output_layouts"]))
    if params.get("input_layouts") is not None:
        updated["input_layouts"] = tuple(
            _slowest_first(layout) if led else layout
            for layout, led in zip(params["input_layouts"], batch.in_led, strict=True)
        )
    return updated


def _slowest_first(layout: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A minor-to-major layout with a new leading dimension, the slowest."""
    return None if layout is None else (*[dimension + 1 for dimension in layout], 0)
