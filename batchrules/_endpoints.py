"""Derivatives that a user gave for a device call: the conventions of `jvp` and `vjp` endpoints.

`jvp(args, tangents)` and `vjp(args, cotangents, needed)` speak in trees like the arguments and the result; here they
become functions of flat arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from batchrules import _trees
from batchrules._device_site import Primal, fill, select
from batchrules._errors import DerivativeError, ResultError


@dataclass(frozen=True)
class GivenTangent:
    """The tangents of the inexact outputs, by the user's `jvp`."""

    primal: Primal
    nonzero: tuple[bool, ...]
    inexact: tuple[bool, ...]

    def __call__(self, *leaves: Any) -> list[Any]:
        """The output tangents."""
        endpoint = self.primal.endpoints.jvp
        if endpoint is None:
            raise DerivativeError(
                f"{self.primal.name} has a vjp but no jvp endpoint, and forward-mode differentiation (jax.jvp, "
                "jax.jacfwd) needs one. Pass jvp=, or use reverse mode (jax.grad, jax.vjp, jax.jacrev)."
            )
        primals, tangents = leaves[: len(self.nonzero)], leaves[len(self.nonzero) :]
        structure = self.primal.structure
        no_tangents = [None] * len(primals)
        args, keywords = structure.assemble(primals)
        result = endpoint(tuple(args), structure.mirror(fill(self.nonzero, tangents, no_tangents)), **keywords)
        outline = self.primal.outline(primals)
        like = _trees.unflatten(outline.tree, outline.outputs)
        answer = _matched(result, like, f"{self.primal.name}: the jvp endpoint", "outputs")
        where = f"{self.primal.name}: the jvp endpoint's tangent of output"
        places = select([_place(path, i) for i, path in enumerate(outline.paths)], self.inexact)
        return _checked(select(answer, self.inexact), select(outline.outputs, self.inexact), where, places)


@dataclass(frozen=True)
class GivenCotangent:
    """The cotangents of the wanted arguments, by the user's `vjp`."""

    primal: Primal
    wanted: tuple[bool, ...]
    seen: tuple[bool, ...]

    def __call__(self, *leaves: Any) -> list[Any]:
        """The argument cotangents."""
        endpoint = self.primal.endpoints.vjp
        if endpoint is None:
            raise DerivativeError(
                f"{self.primal.name} has a jvp but no vjp endpoint, and reverse-mode differentiation (jax.grad, "
                "jax.vjp, jax.jacrev) needs one. Pass vjp=, or use forward mode (jax.jvp, jax.jacfwd)."
            )
        primals, cotangents = leaves[: len(self.wanted)], leaves[len(self.wanted) :]
        structure = self.primal.structure
        outline = self.primal.outline(primals)
        shown = [_fitted(c, x) for c, x in zip(cotangents, select(outline.outputs, self.seen), strict=True)]
        given = _trees.unflatten(outline.tree, fill(self.seen, shown, [None] * len(self.seen)))
        args, keywords = structure.assemble(primals)
        result = endpoint(tuple(args), given, structure.mirror(self.wanted), **keywords)
        answer = _matched(result, structure.mirror(list(primals)), f"{self.primal.name}: the vjp endpoint", "arguments")
        where = f"{self.primal.name}: the vjp endpoint's cotangent of argument"
        places = [str(i) for i, is_wanted in enumerate(self.wanted) if is_wanted]
        return _checked(select(answer, self.wanted), select(primals, self.wanted), where, places)


def _fitted(cotangent: Any, output: Any) -> Any:
    """The cotangent in the shape of an output that leads with 1 because it depends on no mapped argument."""
    return cotangent if cotangent.shape == output.shape else cotangent.sum(0, keepdims=True)


def _place(path: str, position: int) -> str:
    return repr(path) if path else str(position)


def _matched(result: Any, like: Any, where: str, what: str) -> list[Any]:
    try:
        return _trees.matched(result, like)
    except ValueError as error:
        raise ResultError(
            f"{where} must return a tree like the {what}, None where there is nothing: {error}."
        ) from error


def _checked(answer: Sequence[Any], like: Sequence[Any], where: str, places: Sequence[str]) -> list[Any]:
    checked = []
    for value, expected, place in zip(answer, like, places, strict=True):
        array = jnp.zeros(expected.shape, expected.dtype) if value is None else jnp.asarray(value)
        if array.shape != tuple(expected.shape) or array.dtype != expected.dtype:
            raise ResultError(
                f"{where} {place} is {array.dtype}{list(array.shape)}, expected {expected.dtype}{list(expected.shape)}."
            )
        checked.append(array)
    return checked
