"""What a device call runs: a function of flat arrays that JAX can trace, its tangent, or its cotangent.

All of them compare by value. `primals` are the arrays of the call, flat; `nonzero` and `wanted` are one bool for each
of them, `outputs` and `seen` one for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from batchrules._sites import Mask, fill, select


@dataclass(frozen=True)
class Endpoints:
    """The derivatives that a user gave for a device call; without any, derivatives go through the body."""

    jvp: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None
    jacobian: Callable[..., Any] | None = None
    pass_outputs: bool = False

    @property
    def given(self) -> bool:
        """Whether the user gave any, so that the body is not looked into."""
        return self.jvp is not None or self.vjp is not None or self.jacobian is not None


class DeviceBody:
    """A function of flat arrays, which JAX differentiates by tracing it."""

    endpoints: Endpoints = Endpoints()

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:
        """The flat outputs, of one element (None) or of a batch of so many."""
        raise NotImplementedError

    @property
    def passes_outputs(self) -> bool:
        """Whether its derivatives are given its own outputs."""
        return self.endpoints.given and self.endpoints.pass_outputs

    def tangent(self, nonzero: Mask, outputs: Mask) -> DeviceBody:
        """The tangents of these outputs."""
        return Tangent(self, nonzero, outputs)

    def cotangent(self, wanted: Mask, seen: Mask) -> DeviceBody:
        """The cotangents of these primals."""
        return Cotangent(self, wanted, seen)


@dataclass(frozen=True)
class Tangent(DeviceBody):
    """The tangents of a body's outputs, from its primals and the tangents of those that have one."""

    of: DeviceBody
    nonzero: Mask
    outputs: Mask

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:
        """The output tangents."""
        primals, tangents = leaves[: len(self.nonzero)], leaves[len(self.nonzero) :]

        def active(*moving: Any) -> list[Any]:
            return select(self.of(*fill(self.nonzero, moving, primals), size=size), self.outputs)

        return jax.jvp(active, tuple(select(primals, self.nonzero)), tuple(tangents))[1]


@dataclass(frozen=True)
class Cotangent(DeviceBody):
    """The cotangents of the wanted primals of a body, from its primals and the cotangents of its outputs.

    `seen` is one bool for each output: whether it has a cotangent.
    """

    of: DeviceBody
    wanted: Mask
    seen: Mask

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:
        """The cotangents of the wanted primals."""
        primals, cotangents = leaves[: len(self.wanted)], leaves[len(self.wanted) :]

        def active(*moving: Any) -> list[Any]:
            outputs = select(self.of(*fill(self.wanted, moving, primals), size=size), self.seen)
            # One that depends on no mapped primal leads with 1, and its cotangent with the size of the batch.
            return [jnp.broadcast_to(x, given.shape) for x, given in zip(outputs, cotangents, strict=True)]

        return list(jax.vjp(active, *select(primals, self.wanted))[1](list(cotangents)))
