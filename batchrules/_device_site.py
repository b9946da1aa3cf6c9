"""What a device call runs: a function of flat arrays that JAX can trace, its tangent, or its cotangent.

All three compare by value. `primals` are the arrays of the call, flat; `nonzero` and `wanted` are one bool for each of
them, `inexact` and `seen` one for each output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from batchrules import _trees
from batchrules._methods import MethodRequest
from batchrules._recording import Result
from batchrules._signature import CallStructure


class Body(Protocol):
    """A function of flat arrays."""

    def __call__(self, *leaves: Any) -> list[Any]:
        """The flat outputs."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where a derived site came from.

    Attributes:
        base: The site that was differentiated.
        primals: For each operand of the base, whether it has a tangent (or its cotangent is given).
        outputs: For each output of the base, whether its tangent is given (or its cotangent is an operand).
        cotangent: Whether the site gives cotangents and not tangents.
    """

    base: DeviceSite
    primals: tuple[bool, ...]
    outputs: tuple[bool, ...]
    cotangent: bool


@dataclass(frozen=True)
class DeviceSite:
    """A call site: what runs, what it gives for one element, and by which method it is batched.

    Attributes:
        body: What runs.
        name: What messages call it.
        paths: The path of each operand.
        results: What each output of one element is.
        request: The method that was asked for.
        batch_size: The most elements that a vectorised call is given, or None.
        axis_names: The named axes that the body has collectives over.
        linear: How many of the last operands it is linear in: tangents or cotangents.
        origin: Where a derived site came from; None for the user's function.
    """

    body: Body
    name: str
    paths: tuple[str, ...]
    results: tuple[Result, ...]
    request: MethodRequest
    batch_size: int | None
    axis_names: frozenset[Any] = frozenset()
    linear: int = 0
    origin: Origin | None = None

    @property
    def is_cotangent(self) -> bool:
        """Whether it gives cotangents of the primals of its base."""
        return self.origin is not None and self.origin.cotangent

    def __str__(self) -> str:
        """The name, since JAX prints the parameters of a primitive in its errors."""
        return self.name

    __repr__ = __str__


@dataclass(frozen=True)
class Endpoints:
    """The derivatives that a user gave for a device call; None means: differentiate through the body."""

    jvp: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None

    @property
    def given(self) -> bool:
        """Whether the user gave any, so that the body is not looked into."""
        return self.jvp is not None or self.vjp is not None


@dataclass(frozen=True)
class Outline:
    """The shapes and dtypes of a function's outputs, their structure and their paths."""

    outputs: list[Any]
    tree: _trees.Structure
    paths: list[str]


@dataclass(frozen=True)
class Primal:
    """The user's function."""

    function: Callable[..., Any]
    structure: CallStructure
    name: str
    endpoints: Endpoints

    def __call__(self, *leaves: Any) -> list[Any]:
        """Its outputs."""
        return [jnp.asarray(leaf) for leaf in _trees.flatten(self.result(leaves))[0]]

    def result(self, leaves: Sequence[Any]) -> Any:
        """What the function returns."""
        args, kwargs = self.structure.assemble(leaves)
        return self.function(*args, **kwargs)

    def outline(self, leaves: Sequence[Any]) -> Outline:
        """What the function would return for such arrays, without running it."""
        trees: list[tuple[_trees.Structure, list[str]]] = []

        def flat(*moving: Any) -> list[Any]:
            result = self.result(moving)
            outputs, tree = _trees.flatten(result)
            trees.append((tree, _trees.paths(result)))
            return outputs

        outputs = jax.eval_shape(flat, *leaves)
        return Outline(outputs, *trees[-1])


@dataclass(frozen=True)
class Tangent:
    """The tangents of a body's inexact outputs, from its primals and the tangents of those that have one."""

    of: Body
    nonzero: tuple[bool, ...]
    inexact: tuple[bool, ...]

    def __call__(self, *leaves: Any) -> list[Any]:
        """The output tangents."""
        primals, tangents = leaves[: len(self.nonzero)], leaves[len(self.nonzero) :]

        def active(*moving: Any) -> list[Any]:
            return select(self.of(*fill(self.nonzero, moving, primals)), self.inexact)

        return jax.jvp(active, tuple(select(primals, self.nonzero)), tuple(tangents))[1]


@dataclass(frozen=True)
class Cotangent:
    """The cotangents of the wanted primals of a body, from its primals and the cotangents of its outputs.

    `seen` is one bool for each output: whether it has a cotangent.
    """

    of: Body
    wanted: tuple[bool, ...]
    seen: tuple[bool, ...]

    def __call__(self, *leaves: Any) -> list[Any]:
        """The cotangents of the wanted primals."""
        primals, cotangents = leaves[: len(self.wanted)], leaves[len(self.wanted) :]

        def active(*moving: Any) -> list[Any]:
            outputs = select(self.of(*fill(self.wanted, moving, primals)), self.seen)
            # One that depends on no mapped primal leads with 1, and its cotangent with the size of the batch.
            return [jnp.broadcast_to(x, given.shape) for x, given in zip(outputs, cotangents, strict=True)]

        return list(jax.vjp(active, *select(primals, self.wanted))[1](list(cotangents)))


def select(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """The values where the mask is True."""
    return [value for value, chosen in zip(values, mask, strict=True) if chosen]


def fill(mask: Sequence[bool], chosen: Iterable[Any], others: Sequence[Any]) -> list[Any]:
    """`others`, with what is chosen in the places where the mask is True."""
    source = iter(chosen)
    return [next(source) if take else other for take, other in zip(mask, others, strict=True)]
