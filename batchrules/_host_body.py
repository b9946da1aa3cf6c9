"""What a host site runs: the user's function as a function of flat arrays, and the derivatives that it was given.

An endpoint that is a host call has endpoints of its own, for which `(args, tangents)` or `(args, cotangents, needed)`
are the arguments; so every body can tell how its operands look as arguments, and how its results look as a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchrules import _trees
from batchrules._errors import ResultError
from batchrules._host_context import FirstCall
from batchrules._signature import CallStructure


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
        known = _trees.leaves_like(result, self.result_tree)
        if known is not None:
            return known
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
