"""What a host site runs: the user's function, or one of its derivative endpoints, as a function of flat arrays.

Endpoints speak in trees: `jvp(args, tangents)`, `vjp(args, cotangents, needed)`, `jacobian(args, needed)`. An endpoint
that is a host call has endpoints of its own, for which `(args, tangents)` or `(args, cotangents, needed)` are the
arguments; so every body can tell how its operands look as arguments, and how its results look as a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchrules import _trees
from batchrules._errors import ResultError
from batchrules._host_context import FirstCall
from batchrules._signature import CallStructure
from batchrules._sites import Mask, fill


@dataclass(frozen=True)
class Endpoint:
    """A derivative that the user gave: its function, and the derivatives of that."""

    function: Callable[..., Any]
    first_call: FirstCall = field(compare=False, repr=False)
    endpoints: Endpoints

    def __reduce__(self) -> tuple[Any, ...]:
        # In a worker it is called and not compared; the bare function may not be picklable, the first call is.
        return Endpoint, (self.first_call, self.first_call, Endpoints())


@dataclass(frozen=True)
class Endpoints:
    """The derivatives that the user gave for a host function."""

    jvp: Any = None
    vjp: Any = None
    jacobian: Any = None
    pass_outputs: bool = False

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.jvp is not None or self.vjp is not None or self.jacobian is not None


class HostBody:
    """What all bodies have in common."""

    name: str
    endpoints: Endpoints

    @property
    def passes_outputs(self) -> bool:
        """Whether its derivatives are given its own outputs."""
        return self.endpoints.pass_outputs

    def tangent(self, nonzero: Mask, outputs: Mask) -> GivenTangent:
        """The tangents of these outputs."""
        return GivenTangent(self, nonzero, outputs)

    def cotangent(self, wanted: Mask, seen: Mask) -> GivenCotangent:
        """The cotangents of these operands."""
        return GivenCotangent(self, wanted, seen)

    def jacobian(self, wanted: Mask, outputs: Mask) -> GivenJacobian:
        """The Jacobian of these outputs in these operands."""
        return GivenJacobian(self, wanted, outputs)

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The results, flat; None where a derivative is zero."""
        raise NotImplementedError

    def leaves_of(self, result: Any) -> list[Any]:
        """The leaves of what the function returned, after a check of its structure."""
        raise NotImplementedError

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, positional and keyword, that these operands are."""
        raise NotImplementedError

    def mirror(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The positional arguments with these leaves in place of the arrays, and None for static ones."""
        raise NotImplementedError

    def tree(self, results: Sequence[Any]) -> Any:
        """The result with these leaves, one for each output."""
        raise NotImplementedError


@dataclass(frozen=True)
class Primal(HostBody):
    """The user's function."""

    function: Callable[..., Any]
    structure: CallStructure
    result_tree: _trees.Structure
    name: str
    endpoints: Endpoints
    first_call: FirstCall = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # As for an endpoint.
        return Primal, (
            self.first_call, self.structure, self.result_tree, self.name, self.endpoints, self.first_call
        )  # fmt: skip

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """Its results."""
        args, kwargs = self.structure.assemble(leaves)
        return self.leaves_of(self.first_call(args, kwargs))

    def leaves_of(self, result: Any) -> list[Any]:
        """The leaves of what the function returned, after a check of its structure."""
        leaves, tree = _trees.flatten(result)
        if tree != self.result_tree:
            raise ResultError(
                f"{self.name} returned a result of another structure than result_shape promises: expected "
                f"{self.result_tree}, got {tree} (a * is an array). Return what result_shape says, or change "
                "result_shape; None counts as an empty container."
            )
        return leaves

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call."""
        args, kwargs = self.structure.assemble(leaves)
        return tuple(args), kwargs

    def mirror(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments, with None for static ones."""
        return self.structure.mirror(leaves)

    def tree(self, results: Sequence[Any]) -> Any:
        """What the function returns."""
        return _trees.unflatten(self.result_tree, results)


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
        result = self.of.endpoints.jvp.first_call(args, keywords)
        answer = _matched(result, self.of.tree(range(len(self.outputs))), f"{self.name}: the jvp endpoint", "outputs")
        return [answer.get(i) for i, is_wanted in enumerate(self.outputs) if is_wanted]

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
        result = self.of.endpoints.vjp.first_call(args, keywords)
        like = self.of.mirror(range(len(self.wanted)))
        answer = _matched(result, like, f"{self.name}: the vjp endpoint", "arguments")
        return [answer.get(i) for i, is_wanted in enumerate(self.wanted) if is_wanted]

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the endpoint."""
        operands, outputs, cotangents = _parted(self.of, leaves, len(self.wanted), sum(self.seen))
        args, keywords = self.of.arguments(operands)
        return (args, self._given(cotangents), self.of.mirror(self.wanted)), {**keywords, **outputs}

    def mirror(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the endpoint, with None for static ones."""
        operands, _, cotangents = _parted(self.of, leaves, len(self.wanted), sum(self.seen))
        return self.of.mirror(operands), self._given(cotangents), None

    def tree(self, results: Sequence[Any]) -> Any:
        """What the endpoint returns."""
        return self.of.mirror(fill(self.wanted, results, [None] * len(self.wanted)))

    def _given(self, cotangents: Sequence[Any]) -> Any:
        return self.of.tree(fill(self.seen, cotangents, [None] * len(self.seen)))


@dataclass(frozen=True)
class GivenJacobian(HostBody):
    """The blocks of a Jacobian, by the user's `jacobian`. Its operands: those of `of`, its outputs if passed."""

    of: HostBody
    wanted: Mask
    outputs: Mask
    endpoints: Endpoints = Endpoints()

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        """What messages call it."""
        return f"{self.of.name} (jacobian)"

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The blocks: for each output in use, one for each argument in use."""
        operands, outputs, _ = _parted(self.of, leaves, len(self.wanted), 0)
        args, keywords = self.of.arguments(operands)
        needed = self.of.mirror(self.wanted)
        result = self.of.endpoints.jacobian.first_call((args, needed), {**keywords, **outputs})
        where = f"{self.name}: the jacobian endpoint"
        rows = _matched(result, self.of.tree(range(len(self.outputs))), where, "outputs", branches=True)
        like = self.of.mirror(range(len(self.wanted)))
        chosen = [rows.get(j) for j, is_used in enumerate(self.outputs) if is_used]
        blocks = [_matched(row, like, where, "arguments, for each output") for row in chosen]
        return [row.get(i) for row in blocks for i, is_wanted in enumerate(self.wanted) if is_wanted]


def _parted(of: HostBody, leaves: Sequence[Any], operands: int, linear: int) -> tuple[Any, dict[str, Any], Any]:
    """The operands of `of`, its outputs as a keyword if they are passed, and the linear operands."""
    first = len(leaves) - linear
    outputs = {"outputs": of.tree(leaves[operands:first])} if of.passes_outputs else {}
    return leaves[:operands], outputs, leaves[first:]


def _matched(result: Any, like: Any, where: str, what: str, *, branches: bool = False) -> dict[int, Any]:
    """What stands in a result in the place of each number in `like`."""
    try:
        found = _trees.matched(result, like, branches=branches)
    except ValueError as error:
        raise ResultError(
            f"{where} must return a tree like the {what}, None where there is nothing: {error}."
        ) from error
    return dict(zip(_trees.flatten(like)[0], found, strict=True))
