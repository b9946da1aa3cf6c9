"""A bind of a registered primitive in a traced program, where its batching rule has done its work already."""

from __future__ import annotations

import math
from typing import Any

from batchrules import _explain_source
from batchrules._explain_count import NONE, Count, Tally, exactly
from batchrules._explain_found import Found
from batchrules._explain_plan import itemsize
from batchrules._methods import method_of
from batchrules._registration import Registration


def registered_found(eqn: Any, registration: Registration) -> Found:
    """What a bind is."""
    operands = [variable.aval for variable in eqn.invars]
    return Found(
        name=_name(registration), endpoint="call", kind="registered", source=_explain_source.line_of(eqn), axes=(),
        method=_method(registration, eqn.params), reason=_reason(registration), first=None, last=None,
        tally=Tally(exactly(1), NONE, _bytes(operands), _bytes([variable.aval for variable in eqn.outvars])),
        dispatch="in the compiled program", has_elements=False,
        notes=(f"bound to {', '.join(map(str, operands)) or 'nothing'}, mapped axes included",),
    )  # fmt: skip


def _name(registration: Registration) -> str:
    primitive = registration.primitive
    return str(getattr(primitive, "name", None) or getattr(primitive, "__name__", primitive))


def _method(registration: Registration, params: dict[str, Any]) -> str:
    method = registration.method
    return method_of(method, params, registration.where) if callable(method) else method


def _reason(registration: Registration) -> str:
    chunks = "" if registration.batch_size is None else f", in binds of at most {registration.batch_size} elements"
    if callable(registration.method):
        return f"register was given a function that reads it from the parameters{chunks}"
    if registration.method != "auto":
        return f"register was given method={registration.method!r}{chunks}"
    return f"register was given method='auto', which chose for each jax.vmap by the schema{chunks}"


def _bytes(avals: list[Any]) -> Count:
    return exactly(sum(math.prod(aval.shape) * itemsize(aval.dtype) for aval in avals))
