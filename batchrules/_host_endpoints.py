"""Derivative endpoints of a host function as functions of flat arrays.

Endpoints speak in trees: `jvp(args, tangents)`, `vjp(args, cotangents, needed)`, `jacobian(args, needed)`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchrules import _trees
from batchrules._errors import ResultError
from batchrules._host_body import Endpoints, HostBody
from batchrules._sites import Mask, fill, select


@dataclass(frozen=True)
class GivenTangent(HostBody):
    """The tangents of outputs, by the user's `jvp`. Its operands: those of `of`, its outputs if passed, tangents."""

    of: HostBody
    nonzero: Mask
    outputs: Mask

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only, like the fields
        """What messages call it."""
        return f"{self.of.name} (jvp)"

    @property
    def endpoints(self) -> Endpoints:  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        """The derivatives of the endpoint."""
        return Endpoints() if self.of.endpoints.jvp is None else self.of.endpoints.jvp.endpoints

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The output tangents."""
        args, keywords = self.arguments(leaves)
        return self.taken(self.of.endpoints.jvp.first_call(args, keywords))

    def taken(self, result: Any) -> list[Any]:
        """The tangents in what the endpoint returned."""
        return select(self._expected.taken_from(result, self, "jvp"), self.outputs)

    @functools.cached_property
    def _expected(self) -> _Expected:
        return _Expected(self.of.tree(range(len(self.outputs))), len(self.outputs), "outputs")

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the endpoint."""
        operands, outputs, tangents = _parted(self.of, leaves, len(self.nonzero), sum(self.nonzero))
        args, keywords = self.of.arguments(operands)
        return (args, self._mirrored(tangents)), {**keywords, **outputs}

    def mirror(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the endpoint, with None for static ones."""
        operands, _, tangents = _parted(self.of, leaves, len(self.nonzero), sum(self.nonzero))
        return self.of.mirror(operands), self._mirrored(tangents)

    def tree(self, results: Sequence[Any]) -> Any:
        """What the endpoint returns."""
        return self.of.tree(fill(self.outputs, results, [None] * len(self.outputs)))

    def _mirrored(self, tangents: Sequence[Any]) -> tuple[Any, ...]:
        return self.of.mirror(fill(self.nonzero, tangents, [None] * len(self.nonzero)))


@dataclass(frozen=True)
class GivenCotangent(HostBody):
    """The cotangents of operands, by the user's `vjp`. Its operands: those of `of`, its outputs, cotangents."""

    of: HostBody
    wanted: Mask
    seen: Mask

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        """What messages call it."""
        return f"{self.of.name} (vjp)"

    @property
    def endpoints(self) -> Endpoints:  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        """The derivatives of the endpoint."""
        return Endpoints() if self.of.endpoints.vjp is None else self.of.endpoints.vjp.endpoints

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The operand cotangents."""
        args, keywords = self.arguments(leaves)
        return self.taken(self.of.endpoints.vjp.first_call(args, keywords))

    def taken(self, result: Any) -> list[Any]:
        """The cotangents in what the endpoint returned."""
        return select(self._expected.taken_from(result, self, "vjp"), self.wanted)

    @functools.cached_property
    def _expected(self) -> _Expected:
        return _Expected(self.of.mirror(range(len(self.wanted))), len(self.wanted), "arguments")

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the endpoint."""
        operands, outputs, cotangents = _parted(self.of, leaves, len(self.wanted), sum(self.seen))
        args, keywords = self.of.arguments(operands)
        return (args, self._given(cotangents), self.needed), {**keywords, **outputs}

    def mirror(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the endpoint, with None for static ones."""
        operands, _, cotangents = _parted(self.of, leaves, len(self.wanted), sum(self.seen))
        return self.of.mirror(operands), self._given(cotangents), None

    def tree(self, results: Sequence[Any]) -> Any:
        """What the endpoint returns."""
        return self.of.mirror(fill(self.wanted, results, [None] * len(self.wanted)))

    @functools.cached_property
    def needed(self) -> tuple[Any, ...]:
        """Which operands' cotangents are asked for, in the shape of the arguments."""
        return self.of.mirror(self.wanted)

    def _given(self, cotangents: Sequence[Any]) -> Any:
        return self.of.tree(fill(self.seen, cotangents, [None] * len(self.seen)))


@dataclass(frozen=True)
class GivenJacobian(HostBody):
    """The blocks of a Jacobian, by the user's `jacobian`. Its operands: those of `of`, its outputs if passed."""

    of: HostBody
    wanted: Mask
    outputs: Mask

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        """What messages call it."""
        return f"{self.of.name} (jacobian)"

    @property
    def endpoints(self) -> Endpoints:  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        """None: what a Jacobian is contracted with is differentiated by endpoints."""
        return Endpoints()

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The blocks: for each output in use, one for each argument in use."""
        operands, outputs, _ = _parted(self.of, leaves, len(self.wanted), 0)
        args, keywords = self.of.arguments(operands)
        needed = self.of.mirror(self.wanted)
        result = self.of.endpoints.jacobian.first_call((args, needed), {**keywords, **outputs})
        outputs_like = self.of.tree(range(len(self.outputs)))
        rows = _Expected(outputs_like, len(self.outputs), "outputs", branches=True).taken_from(result, self, "jacobian")
        row_like = self.of.mirror(range(len(self.wanted)))
        row = _Expected(row_like, len(self.wanted), "arguments, for each output")
        chosen = [row.taken_from(blocks, self, "jacobian") for blocks in select(rows, self.outputs)]
        return [block for blocks in chosen for block in select(blocks, self.wanted)]


def _parted(of: HostBody, leaves: Sequence[Any], operands: int, linear: int) -> tuple[Any, dict[str, Any], Any]:
    """The operands of `of`, its outputs as a keyword if they are passed, and the linear operands."""
    first = len(leaves) - linear
    outputs = {"outputs": of.tree(leaves[operands:first])} if of.passes_outputs else {}
    return leaves[:operands], outputs, leaves[first:]


class _Expected:
    """What an endpoint is to return: a tree like `like`, which has a number in the place of each of `count` arrays."""

    def __init__(self, like: Any, count: int, what: str, *, branches: bool = False) -> None:
        self._like = like
        self._count = count
        self._what = what
        self._branches = branches
        self._numbers, self._structure = _trees.flatten(like)
        self._is_whole = self._numbers == list(range(count)) and not branches

    def taken_from(self, result: Any, body: HostBody, endpoint: str) -> list[Any]:
        """What stands in the place of each number; None where there is nothing."""
        if self._is_whole and (leaves := _trees.leaves_like(result, self._structure)) is not None:
            return leaves
        try:
            found = _trees.matched(result, self._like, branches=self._branches)
        except ValueError as error:
            raise ResultError(
                f"{body.name}: the {endpoint} endpoint must return a tree like the {self._what}, None where there is "
                f"nothing: {error}."
            ) from error
        by_number = dict(zip(self._numbers, found, strict=True))
        return [by_number.get(number) for number in range(self._count)]
