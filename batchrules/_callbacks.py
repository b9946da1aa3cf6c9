"""Emit a Python callback into a program that is being lowered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.interpreters import mlir


def emit(
    ctx: mlir.LoweringRuleContext,
    function: Callable[..., tuple[Any, ...]],
    operands: Sequence[Any],
    *,
    has_side_effect: bool = False,
) -> Sequence[Any]:
    """Emit a callback that each device makes for itself, with the arrays it holds, as NumPy arrays.

    A tenth of the price of `jax.pure_callback`, which goes through JAX arrays on the way in and out.
    """
    avals: Any = ctx.avals_in, ctx.avals_out
    results, _, _ = mlir.emit_python_callback(
        ctx, function, None, list(operands), *avals, has_side_effect=has_side_effect
    )
    return results
