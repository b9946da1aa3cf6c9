"""A call site: what runs, what it promised, and by which method it is batched. Sites compare by value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batchrules._errors import MissingEndpointError
from batchrules._methods import MethodRequest
from batchrules._recording import Result

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Origin:
    """Where a derived site came from.

    Attributes:
        base: The site that was differentiated.
        primals: For each operand of the base, whether it has a tangent (or its cotangent is given).
        outputs: For each output of the base, whether its tangent is given (or its cotangent is an operand).
        cotangent: Whether the site gives cotangents and not tangents.
    """

    base: Site
    primals: Mask
    outputs: Mask
    cotangent: bool


@dataclass(frozen=True, kw_only=True)
class Site:
    """A call site.

    The operands of a derived site are those of its base, then the outputs of its base if it is given them, then the
    tangents or cotangents that it is linear in.

    Attributes:
        body: What runs.
        name: What messages call it.
        paths: The path of each operand.
        results: What each output of one element is.
        request: The method that was asked for.
        batch_size: The most elements that a vectorised call is given, or None.
        linear: How many of the last operands it is linear in.
        origin: Where a derived site came from; None for the user's function.
        masks: How many of the first operands (0 or 1) say whether an element is called at all.
    """

    body: Any
    name: str
    paths: tuple[str, ...]
    results: tuple[Result, ...]
    request: MethodRequest
    batch_size: int | None
    linear: int = 0
    origin: Origin | None = None
    masks: int = 0

    @property
    def is_cotangent(self) -> bool:
        """Whether it gives cotangents of the primals of its base."""
        return self.origin is not None and self.origin.cotangent

    @property
    def passed(self) -> int:
        """How many outputs of its own a site derived from this one is given."""
        return len(self.results) if self.body.passes_outputs else 0

    def tangent_body(self, nonzero: Mask, outputs: Mask) -> Any:
        """What gives the tangents of these outputs, from the tangents of these operands."""
        return self.body.tangent(nonzero, outputs)

    def cotangent_body(self, wanted: Mask, seen: Mask) -> Any:
        """What gives the cotangents of these operands, from the cotangents of these outputs."""
        return self.body.cotangent(wanted, seen)

    def jacobian_body(self, wanted: Mask, outputs: Mask) -> Any:
        """What gives the Jacobian of these outputs in these operands."""
        return self.body.jacobian(wanted, outputs)

    def check_differentiable(self) -> None:
        """Raise if nothing can be known of the derivatives of this site."""

    def shown(self, outputs: Sequence[Any]) -> list[Any]:
        """The site's outputs, as a site derived from it is given them."""
        return list(outputs)

    def __str__(self) -> str:
        """The name, since JAX prints the parameters of a primitive in its errors."""
        return self.name

    __repr__ = __str__


def select(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """The values where the mask is True."""
    return [value for value, chosen in zip(values, mask, strict=True) if chosen]


def fill(mask: Sequence[bool], chosen: Iterable[Any], others: Sequence[Any]) -> list[Any]:
    """`others`, with what is chosen in the places where the mask is True."""
    source = iter(chosen)
    return [next(source) if take else other for take, other in zip(mask, others, strict=True)]


def missing_endpoint(of: Any, which: str, hint: str = "", remedy: str | None = None) -> MissingEndpointError:
    """The error for a derivative of a body that has no endpoint for it; a remedy stands in place of our advice."""
    other, mode, ways, instead = (
        ("vjp", "forward", "jax.jvp, jax.jacfwd", "reverse mode (jax.grad, jax.vjp, jax.jacrev)")
        if which == "jvp"
        else ("jvp", "reverse", "jax.grad, jax.vjp, jax.jacrev", "forward mode (jax.jvp, jax.jacfwd)")
    )
    has_other = getattr(of.endpoints, other) is not None
    there = f"has a {other} but no {which}" if has_other else f"has no {which}"
    use = f"; or use {instead}" if has_other else ""
    advice = f"Pass {which}=, or jacobian=, which serves both{use}.{hint}" if remedy is None else remedy
    return MissingEndpointError(
        f"{of.name} {there} endpoint, and {mode}-mode differentiation ({ways}) needs one. {advice}"
    )
