"""Which equations of a traced program call foreign code."""

from __future__ import annotations

from typing import Any

from batchrules._device_primitive import device_call_p
from batchrules._host_primitive import host_call_p
from batchrules._register import registered
from batchrules._registration import Registration


def is_foreign(eqn: Any) -> bool:
    """Whether an equation is a host call, a device call, or a bind of a registered primitive."""
    return eqn.primitive is host_call_p or eqn.primitive is device_call_p or registration_of(eqn) is not None


def registration_of(eqn: Any) -> Registration | None:
    """The registration of an equation's primitive, or of the HiJAX primitive in it."""
    own = registered(eqn.primitive)
    if own is not None:
        return own
    hijax = (registered(type(value)) for value in eqn.params.values())
    return next((registration for registration in hijax if registration is not None), None)
