"""Find out, without calling anything, what a mapped call would be: trace it and read the recorded batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from batchrules._batch import Axes


@dataclass(frozen=True)
class RecordedCall:
    """A call site with the axes that it was mapped over, and the shapes of its arguments with them."""

    site: Any
    axes: Axes
    shapes: list[tuple[int, ...]]


def recorded_call(
    primitive: Any, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], in_axes: Any
) -> RecordedCall:
    """The first call of a primitive in `jax.vmap(fun, in_axes)(*args, **kwargs)`."""
    mapped = jax.vmap(fun, in_axes=in_axes)
    jaxpr = jax.make_jaxpr(functools.partial(mapped, **kwargs))(*args)
    equation = next(eqn for eqn in jaxpr.eqns if eqn.primitive is primitive)
    shapes = [tuple(variable.aval.shape) for variable in equation.invars]
    return RecordedCall(equation.params["site"], equation.params["axes"], shapes)
