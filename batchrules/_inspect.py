"""Find out, without calling anything, what a mapped call would be: trace it and read the recorded batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from batchrules._batch import Axes
from batchrules._signature import KeywordCall


@dataclass(frozen=True)
class RecordedCall:
    """A call site with the axes that it was mapped over, and the shapes of its arguments with them."""

    site: Any
    axes: Axes
    shapes: list[tuple[int, ...]]


def recorded_call(primitive: Any, call: KeywordCall, args: tuple[Any, ...], in_axes: Any) -> RecordedCall:
    """The first call of a primitive in `jax.vmap(fun, in_axes)(*args, **kwargs)`."""
    fun = functools.partial(call.fun, **call.static)
    # Unmapped arguments stay outside the trace, since some of them may be static.
    unmapped = [isinstance(in_axes, tuple | list) and i < len(in_axes) and in_axes[i] is None for i in range(len(args))]
    traced = [arg for arg, is_unmapped in zip(args, unmapped, strict=True) if not is_unmapped]

    def mapped_call(moving: list[Any], keywords: dict[str, Any]) -> Any:
        source = iter(moving)
        all_args = [arg if is_unmapped else next(source) for arg, is_unmapped in zip(args, unmapped, strict=True)]
        return jax.vmap(fun, in_axes=in_axes)(*all_args, **keywords)

    jaxpr = jax.make_jaxpr(mapped_call)(traced, call.mapped)
    equation = next(eqn for eqn in jaxpr.eqns if eqn.primitive is primitive)
    shapes = [tuple(variable.aval.shape) for variable in equation.invars]
    return RecordedCall(equation.params["site"], equation.params["axes"], shapes)
