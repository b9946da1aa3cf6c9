"""A host call site, and how its calls are to be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from batchrules._dispatch import Dispatch
from batchrules._errors import MissingEndpointError
from batchrules._host_body import HostBody, Primal
from batchrules._host_endpoints import GivenCotangent, GivenJacobian, GivenTangent
from batchrules._host_trust import Trust
from batchrules._sites import Mask, Site

# Where a library that wraps host calls may say what to do in words of its own.
REMEDIES = ("method", "batch", "derivatives", "jvp", "vjp", "second")
Remedies = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Conduct:
    """How the calls of a host function are made, and what happens when one fails.

    Attributes:
        dispatch: In order, or by an executor.
        verify: The relative tolerance that vectorised calls are checked with; True for the default, False for none.
        on_error: `"raise"`, or `"nan"`.
        skip_zero: Whether a sequential derivative makes no call for (co)tangents that are all zero.
        allow_jax: Whether the function may use JAX.
        progress: What shows the progress of its batches, or None.
    """

    dispatch: Dispatch
    verify: float | bool
    on_error: str
    skip_zero: bool
    allow_jax: bool
    progress: Any = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True, repr=False)
class HostSite(Site):
    """A call site of a host function.

    Attributes:
        conduct: How its calls are made.
        trust: What is known of its vectorised calls.
        remedies: What to do about some errors, in words of a library that wraps it.
    """

    body: HostBody
    conduct: Conduct
    trust: Trust = field(compare=False, repr=False)
    remedies: Remedies = ()

    def remedy(self, of: str, otherwise: str) -> str:
        """What to do, in words of a library that wraps the call, or else in ours."""
        return dict(self.remedies).get(of, otherwise)

    def tangent_body(self, nonzero: Mask, outputs: Mask) -> GivenTangent:
        """What gives the tangents of these outputs, from the tangents of these operands."""
        return GivenTangent(self.body, nonzero, outputs)

    def cotangent_body(self, wanted: Mask, seen: Mask) -> GivenCotangent:
        """What gives the cotangents of these operands, from the cotangents of these outputs."""
        return GivenCotangent(self.body, wanted, seen)

    def jacobian_body(self, wanted: Mask, outputs: Mask) -> GivenJacobian:
        """What gives the Jacobian of these outputs in these operands."""
        return GivenJacobian(self.body, wanted, outputs)

    def check_differentiable(self) -> None:
        """Raise if the user gave no derivatives. Which one is missing is known later: JAX makes a jvp to get a vjp."""
        if isinstance(self.body, Primal) and not self.body.endpoints.given:
            ways = (
                "Give it derivatives: jvp=, vjp= or jacobian=, or **batchrules.finite_difference(fn) for all; or "
                "differentiate with respect to other arguments (argnums), or keep its arguments constant with "
                "jax.lax.stop_gradient."
            )
            raise MissingEndpointError(
                f"{self.name} cannot be differentiated: JAX cannot see inside a host function. "
                f"{self.remedy('derivatives', ways)}"
            )

    def shown(self, outputs: Sequence[Any]) -> list[Any]:
        """Constants: an endpoint that is given the outputs says what its whole derivative is."""
        return [jax.lax.stop_gradient(output) for output in outputs]

    @property
    def promise(self) -> str:
        """Who says what a result must be, for messages."""
        return "result_shape promises" if isinstance(self.body, Primal) else "what it belongs to has"
