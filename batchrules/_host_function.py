"""A host function as the runner sees it: arrays in, checked arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules import _trees
from batchrules._errors import BatchContractError, ReadOnlyArgumentError, ResultError
from batchrules._host_context import FirstCall
from batchrules._methods import MethodRequest
from batchrules._recording import Result
from batchrules._signature import CallStructure


@dataclass(frozen=True)
class HostFunction:
    """A call site: the function, how its arguments are assembled and what it promised. Compares by value.

    Attributes:
        function: The user's function.
        name: What messages call it.
        structure: Everything of the call but its arrays.
        paths: The path of each array argument.
        result_tree: The structure of the result.
        results: What each output of one element must be.
        request: The method that was asked for.
        batch_size: The most elements that a vectorised call is given, or None.
        allow_jax: Whether the function may use JAX.
    """

    function: Callable[..., Any]
    name: str
    structure: CallStructure
    paths: tuple[str, ...]
    result_tree: _trees.Structure
    results: tuple[Result, ...]
    request: MethodRequest
    batch_size: int | None
    allow_jax: bool
    first_call: FirstCall = field(compare=False, repr=False)

    def __str__(self) -> str:
        """The name, since JAX prints the parameters of a primitive in its errors."""
        return self.name

    __repr__ = __str__

    @property
    def flat(self) -> bool:
        """Whether the arguments are the leaves, one after another, and the result is one array."""
        args, kwargs = self.structure.assemble(range(len(self.paths)))
        in_order = list(args) == list(range(len(self.paths)))
        return in_order and not kwargs and len(self.results) == 1 and self.results[0].path == ""

    def call(self, leaves: Sequence[Any]) -> list[Any]:
        """Call the function and give the leaves of its result, unchecked."""
        args, kwargs = self.structure.assemble(leaves)
        try:
            result = self.first_call(args, kwargs)
        except ValueError as error:
            self.explain(error)
            raise
        return self.result_leaves(result)

    def explain(self, error: ValueError) -> None:
        """Raise a clearer error if the function wrote into an argument; else leave it to the caller to raise."""
        # NumPy's own words, and without str(error), which is the user's code.
        words = [word for word in error.args if isinstance(word, str)]
        if any(word.endswith(("destination is read-only", "array is read-only")) for word in words):
            raise ReadOnlyArgumentError(
                f"{self.name} writes into one of its arguments ({error}). Arguments belong to JAX and are read-only: "
                "take a copy first (x = x.copy()) and write into that."
            ) from error

    def result_leaves(self, result: Any) -> list[Any]:
        """The leaves of a result, after a check of its structure."""
        leaves, tree = _trees.flatten(result)
        if tree != self.result_tree:
            raise ResultError(
                f"{self.name} returned a result of another structure than result_shape promises: expected "
                f"{self.result_tree}, got {tree} (a * is an array). Return what result_shape says, or change "
                "result_shape; None counts as an empty container."
            )
        return leaves


def as_array(function: HostFunction, output: int, value: Any, where: str) -> np.ndarray[Any, Any]:
    """One output as a NumPy array of the promised dtype, or an error saying what is wrong with it."""
    promised = function.results[output]
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        return _python_scalar(function, promised, value, where)
    if isinstance(value, np.ma.MaskedArray):
        raise ResultError(
            f"{function.name}{where}: {_output(promised)} is a masked array, and JAX has no masks. Return "
            "result.filled(value), and the mask beside it if it matters."
        )
    array = np.asarray(value)
    if array.dtype != promised.dtype:
        raise ResultError(
            f"{function.name}{where}: {_output(promised)} has dtype {array.dtype}, but result_shape promises "
            f"{promised.dtype}. Convert it in the function: result.astype({promised.dtype.name!r})."
        )
    return array


def _python_scalar(function: HostFunction, promised: Result, value: Any, where: str) -> np.ndarray[Any, Any]:
    came = next(rank for rank, kind in enumerate((bool, int, float, complex)) if isinstance(value, kind))
    fits = next(
        rank
        for rank, kind in enumerate((np.bool_, np.integer, np.floating, np.complexfloating))
        if jnp.issubdtype(promised.dtype, kind)
    )
    reason = f"a {type(value).__name__} does not fit"
    if came <= fits:
        try:
            return np.asarray(value, promised.dtype)
        except OverflowError:
            reason = "it is out of range"
    raise ResultError(
        f"{function.name}{where}: {_output(promised)} is {value!r}, but result_shape promises {promised.dtype}, and "
        f"{reason}."
    )


def check_element(function: HostFunction, output: int, array: np.ndarray[Any, Any], where: str) -> None:
    """Raise unless an array has the shape that was promised for one element."""
    promised = function.results[output]
    if array.shape == promised.shape:
        return
    raise ResultError(
        f"{function.name}{where}: {_output(promised)} has shape {array.shape}, but result_shape promises "
        f"{promised.shape} for one element. Return that shape, or change result_shape."
    )


def check_batch(function: HostFunction, output: int, array: np.ndarray[Any, Any], given: BatchGiven) -> None:
    """Raise unless an array is a batch of what was promised: leading with N, or with 1 where the method allows it."""
    promised = function.results[output]
    leads = (given.size, 1) if given.method == "expand_dims" else (given.size,)
    if array.ndim and array.shape[0] in leads and array.shape[1:] == promised.shape:
        return
    expected = " or ".join(str((lead, *promised.shape)) for lead in dict.fromkeys(leads))
    one = ", or with 1 if it depends on no mapped argument" if len(leads) > 1 else ""
    raise BatchContractError(
        f"{function.name} was given a batch of {given.size} elements at once (method {given.method!r}), with arguments "
        f"{given.described(function.paths)}, and {_output(promised)} has shape {array.shape}: expected {expected}. "
        f"Every output must lead with the size of the batch{one}. Make the function handle a leading dimension, or "
        "use method='sequential'."
    )


@dataclass(frozen=True)
class BatchGiven:
    """What a vectorised call was given, for messages."""

    method: str
    size: int
    shapes: tuple[tuple[int, ...], ...]

    def described(self, paths: Sequence[str]) -> str:
        """The arguments' paths and shapes."""
        return ", ".join(f"{path} {shape}" for path, shape in zip(paths, self.shapes, strict=True)) or "none"


def _output(promised: Result) -> str:
    return f"output {promised.path!r}" if promised.path else "the result"
