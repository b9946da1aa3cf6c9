"""Everything that differs between the supported versions of JAX (0.7 up to 0.12), in public names only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.core
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

# The class is `jax.extend.core.Primitive`, whose package imports Pallas from jax 0.9 on: 16 ms for one name.
Primitive: Any = type(jax.lax.add_p)


def varying_axes(aval: Any) -> frozenset[Any]:
    """The manual mesh axes that a value varies over inside `jax.shard_map`."""
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", ()))


def cast_varying(value: Any, axes: Iterable[Any]) -> Any:
    """The value, typed as varying over these manual mesh axes too."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(jax.typeof(value)))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # pyright: ignore[reportAttributeAccessIssue]  # jax 0.7 only


def result_type(like: Any, shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Any:
    """An abstract array that lives where `like` lives: the same varying axes, sharded by `spec`.

    `like` is None for a call without arguments.
    """
    if like is None or like.sharding.mesh.empty:
        return jax.core.ShapedArray(shape, dtype)
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def with_lead(aval: Any, size: int) -> Any:
    """The abstract array with a leading dimension more."""
    return with_axis(aval, 0, size)


def with_axis(aval: Any, axis: int, size: int) -> Any:
    """The abstract array with one more dimension."""
    spec = aval.sharding.spec
    shape = (*aval.shape[:axis], size, *aval.shape[axis:])
    return result_type(aval, shape, aval.dtype, (*spec[:axis], None, *spec[axis:]))


def is_export(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether a program is being lowered for `jax.export`."""
    parameters = getattr(ctx.module_context, "lowering_parameters", None)
    return bool(getattr(parameters, "for_export", False))


def canonical_dtype(dtype: Any) -> Any:
    """The dtype that JAX holds such data in: 32 bits where 64-bit types are off."""
    return jax.dtypes.canonicalize_dtype(dtype)


def hijax_primitive_class() -> Any:
    """The base class of HiJAX primitives: `VJPHiPrimitive` up to jax 0.11, `HiPrim` after; None before."""
    try:
        from jax.experimental import hijax  # noqa: PLC0415  # not there in jax 0.7
    except ImportError:
        return None
    return getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive


def closed_like(closed: Any, jaxpr: Any) -> Any:
    """The jaxpr, closed over the constants of another that it was made of."""
    from jax.extend.core import ClosedJaxpr  # noqa: PLC0415  # the package imports Pallas, as said above

    # From jax 0.12 on each jaxpr has its own constants, and the two classes are one.
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, closed.consts)


def without_axis(aval: Any, axis: int) -> Any:
    """The abstract array without one of its dimensions."""
    spec = aval.sharding.spec
    shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
    return result_type(aval, shape, aval.dtype, (*spec[:axis], *spec[axis + 1 :]))


def is_reference(x: Any) -> bool:
    """Whether this is a `jax.Ref`, or stands for one while JAX traces. There is no public class before jax 0.8."""
    if isinstance(x, jax.core.Tracer):
        return type(jax.typeof(x)).__name__ == "AbstractRef"
    return isinstance(x, getattr(jax, "Ref", ()))
