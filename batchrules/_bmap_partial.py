"""What JAX may know of a bmap before it knows the inputs that a program is linear in (`jax.linear_transpose`, solvers).

By default nothing that a primitive gives is known while one of its operands is not. But an exchange only looks as if
its results depended on each other, and joining and settling only look as if a result depended on what stands beside
it. What is taken for unknown is taken for linear, and a product of two such numbers cannot be transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.interpreters import partial_eval as pe

from batchrules._bmap_advance import advance_p
from batchrules._bmap_primitives import write_p


def knows_the_first(primitive: Any) -> None:
    """Tell JAX that a primitive gives its first operand, whether the others are known or not."""

    def rule(trace: Any, *tracers: Any, **params: Any) -> Any:
        if tracers[0].is_known() and not _known(tracers):
            return tracers[0]
        return trace.default_process_primitive(primitive, tracers, params)

    pe.custom_partial_eval_rules[primitive] = rule


def knows_apart(exchange_p: Any) -> None:
    """Tell JAX that the result of an exchange and its carrier are known or not, each for itself."""

    def rule(trace: Any, *tracers: Any, axis: int, size: int) -> Any:
        whole, carrier, ahead, marker, part, start = tracers
        written, carried = (whole, part, start), (carrier, ahead, marker, start)
        if _known(written) == _known(carried):
            return trace.default_process_primitive(exchange_p, tracers, {"axis": axis, "size": size})
        step = part.aval.shape[axis]
        one = _evaluated(trace, write_p, written, {"axis": axis, "apart": False})
        return [one, *_evaluated(trace, advance_p, carried, {"axis": axis, "size": size, "step": step})]

    pe.custom_partial_eval_rules[exchange_p] = rule


def _known(tracers: Sequence[Any]) -> bool:
    return all(tracer.is_known() for tracer in tracers)


def _evaluated(trace: Any, primitive: Any, tracers: Sequence[Any], params: dict[str, Any]) -> Any:
    """A primitive now if all its operands are known, else later."""
    if not _known(tracers):
        return trace.default_process_primitive(primitive, tracers, params)
    known: Callable[[Any], Any] = trace.new_const
    results = primitive.bind(*(tracer.pval.get_known() for tracer in tracers), **params)
    return [known(result) for result in results] if primitive.multiple_results else known(results)
