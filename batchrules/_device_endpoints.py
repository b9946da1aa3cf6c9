"""The user's function of a device call, and the derivatives that the user gave for it.

`jvp(args, tangents)`, `vjp(args, cotangents, needed)` and `jacobian(args, needed)` speak in trees like the arguments
and the result; here they become functions of flat arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from batchrules import _trees
from batchrules._device_body import DeviceBody, Endpoints
from batchrules._device_contraction import Jacobian
from batchrules._errors import ResultError
from batchrules._signature import CallStructure
from batchrules._sites import Mask, fill, missing_endpoint, select


@dataclass(frozen=True)
class Outline:
    """The shapes and dtypes of a function's outputs, their structure and their paths."""

    outputs: list[Any]
    tree: _trees.Structure
    paths: list[str]


@dataclass(frozen=True)
class Primal(DeviceBody):
    """The user's function."""

    function: Callable[..., Any]
    structure: CallStructure
    name: str
    endpoints: Endpoints

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:  # noqa: ARG002  # shapes tell it all
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

    def tangent(self, nonzero: Mask, outputs: Mask) -> DeviceBody:
        """The tangents of these outputs."""
        return GivenTangent(self, nonzero, outputs) if self.endpoints.given else super().tangent(nonzero, outputs)

    def cotangent(self, wanted: Mask, seen: Mask) -> DeviceBody:
        """The cotangents of these primals."""
        return GivenCotangent(self, wanted, seen) if self.endpoints.given else super().cotangent(wanted, seen)

    def jacobian(self, wanted: Mask, outputs: Mask) -> DeviceBody:
        """The Jacobian of these outputs in these primals."""
        return GivenJacobian(self, wanted, outputs)

    def passed(self, outline: Outline, outputs: Sequence[Any]) -> dict[str, Any]:
        """The keyword with the call's own outputs, if endpoints are given them."""
        return {"outputs": _trees.unflatten(outline.tree, outputs)} if self.passes_outputs else {}


@dataclass(frozen=True)
class GivenTangent(DeviceBody):
    """The tangents of outputs, by the user's `jvp`. Its operands: primals, outputs if passed, tangents."""

    primal: Primal
    nonzero: Mask
    outputs: Mask

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:
        """The output tangents."""
        endpoint, count = self.primal.endpoints.jvp, len(self.nonzero)
        if endpoint is None:
            return self._by_jacobian(leaves, size)
        primals, outputs, tangents = _parted(leaves, count, sum(self.nonzero))
        structure, outline = self.primal.structure, self.primal.outline(primals)
        args, keywords = structure.assemble(primals)
        moves = structure.mirror(fill(self.nonzero, tangents, [None] * count))
        result = endpoint(tuple(args), moves, **keywords, **self.primal.passed(outline, outputs))
        like = _trees.unflatten(outline.tree, outline.outputs)
        answer = _matched(result, like, f"{self.primal.name}: the jvp endpoint", "outputs")
        where = f"{self.primal.name}: the jvp endpoint's tangent of output"
        places = select([_place(path, i) for i, path in enumerate(outline.paths)], self.outputs)
        return _checked(select(answer, self.outputs), select(outline.outputs, self.outputs), where, places)

    def _by_jacobian(self, leaves: Sequence[Any], size: int | None) -> list[Any]:
        if self.primal.endpoints.jacobian is None:
            raise missing_endpoint(self.primal, "jvp")
        first = len(leaves) - sum(self.nonzero)
        blocks = GivenJacobian(self.primal, self.nonzero, self.outputs)
        return blocks.taken(leaves[:first], size).forward(leaves[first:])


@dataclass(frozen=True)
class GivenCotangent(DeviceBody):
    """The cotangents of the wanted arguments, by the user's `vjp`. Its operands: primals, outputs, cotangents."""

    primal: Primal
    wanted: Mask
    seen: Mask

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:
        """The argument cotangents."""
        endpoint = self.primal.endpoints.vjp
        if endpoint is None:
            return self._by_jacobian(leaves, size)
        primals, outputs, cotangents = _parted(leaves, len(self.wanted), sum(self.seen))
        structure, outline = self.primal.structure, self.primal.outline(primals)
        shown = [_fitted(c, x) for c, x in zip(cotangents, select(outline.outputs, self.seen), strict=True)]
        given = _trees.unflatten(outline.tree, fill(self.seen, shown, [None] * len(self.seen)))
        args, keywords = structure.assemble(primals)
        needed = structure.mirror(self.wanted)
        result = endpoint(tuple(args), given, needed, **keywords, **self.primal.passed(outline, outputs))
        answer = _matched(result, structure.mirror(list(primals)), f"{self.primal.name}: the vjp endpoint", "arguments")
        where = f"{self.primal.name}: the vjp endpoint's cotangent of argument"
        places = [str(i) for i, is_wanted in enumerate(self.wanted) if is_wanted]
        return _checked(select(answer, self.wanted), select(primals, self.wanted), where, places)

    def _by_jacobian(self, leaves: Sequence[Any], size: int | None) -> list[Any]:
        if self.primal.endpoints.jacobian is None:
            raise missing_endpoint(self.primal, "vjp")
        first = len(leaves) - sum(self.seen)
        blocks = GivenJacobian(self.primal, self.wanted, self.seen)
        return blocks.taken(leaves[:first], size).reverse(leaves[first:])


@dataclass(frozen=True)
class GivenJacobian(DeviceBody):
    """The blocks of a Jacobian, by the user's `jacobian`: for each output in use, one for each argument in use."""

    primal: Primal
    wanted: Mask
    outputs: Mask

    def __call__(self, *leaves: Any, size: int | None = None) -> list[Any]:  # noqa: ARG002  # shapes tell it all
        """The blocks."""
        endpoint = self.primal.endpoints.jacobian
        if endpoint is None:
            raise missing_endpoint(self.primal, "jacobian")
        primals, outputs, _ = _parted(leaves, len(self.wanted), 0)
        structure, outline = self.primal.structure, self.primal.outline(primals)
        args, keywords = structure.assemble(primals)
        needed = structure.mirror(self.wanted)
        result = endpoint(tuple(args), needed, **keywords, **self.primal.passed(outline, outputs))
        where = f"{self.primal.name}: the jacobian endpoint"
        like = _trees.unflatten(outline.tree, outline.outputs)
        rows = select(_matched(result, like, where, "outputs", branches=True), self.outputs)
        blocks = [_matched(row, structure.mirror(list(primals)), where, "arguments, for each output") for row in rows]
        return [jnp.asarray(block) for row in blocks for block in select(row, self.wanted)]

    def taken(self, leaves: Sequence[Any], size: int | None) -> Jacobian:
        """The Jacobian of one element (None) or of a batch of so many, to be contracted where JAX traces it."""
        primals = leaves[: len(self.wanted)]
        outputs = select(self.primal.outline(primals).outputs, self.outputs)
        return Jacobian(self(*leaves), outputs, select(primals, self.wanted), size, self.primal.name)


def _parted(leaves: Sequence[Any], primals: int, linear: int) -> tuple[Any, Any, Any]:
    """The primals, the outputs that are passed, and the linear operands."""
    first = len(leaves) - linear
    return leaves[:primals], leaves[primals:first], leaves[first:]


def _fitted(cotangent: Any, output: Any) -> Any:
    """The cotangent in the shape of an output that leads with 1 because it depends on no mapped argument."""
    return cotangent if cotangent.shape == output.shape else cotangent.sum(0, keepdims=True)


def _place(path: str, position: int) -> str:
    return repr(path) if path else str(position)


def _matched(result: Any, like: Any, where: str, what: str, *, branches: bool = False) -> list[Any]:
    try:
        return _trees.matched(result, like, branches=branches)
    except ValueError as error:
        raise ResultError(
            f"{where} must return a tree like the {what}, None where there is nothing: {error}."
        ) from error


def _checked(answer: Sequence[Any], like: Sequence[Any], where: str, places: Sequence[str]) -> list[Any]:
    checked = []
    for value, expected, place in zip(answer, like, places, strict=True):
        array = jnp.zeros(expected.shape, expected.dtype) if value is None else jnp.asarray(value)
        if jnp.iscomplexobj(array) and not jnp.issubdtype(expected.dtype, jnp.complexfloating):
            # JAX's convention: what a complex derivative gives for a real number is its real part.
            array = array.real
        if array.shape != tuple(expected.shape) or array.dtype != expected.dtype:
            raise ResultError(
                f"{where} {place} is {array.dtype}{list(array.shape)}, expected {expected.dtype}{list(expected.shape)}."
            )
        checked.append(array)
    return checked
