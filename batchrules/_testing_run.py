"""Run one case, and compare it with one-element calls."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from batchrules._errors import BatchContractWarning
from batchrules._failures import original_errors
from batchrules._testing_cases import Case, axes_of, in_front
from batchrules._testing_comparisons import Tolerance, as_numpy, largest, wide
from batchrules._testing_leaves import Array, Leaf

# A function of flat arrays that gives flat arrays.
Flat = Callable[..., list[Any]]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is checked, for one element.

    Attributes:
        name: What messages call it.
        flat: The function of flat arrays.
        chunked: The same with `batch_size=2`, or None where `bmap` must do that.
        unverified: The same without the check of batches, to look for causes; or None.
        hint: What is added to the cause of a batch that is wrong.
        traced: Whether JAX sees inside. Its derivatives are compiled then: one by one, their operations take longer.
    """

    name: str
    flat: Flat
    chunked: Flat | None = None
    unverified: Subject | None = None
    hint: str = ""
    traced: bool = False


@dataclass(frozen=True, eq=False)
class Way:
    """A transformation of a function of one element into one of a batch.

    Attributes:
        name: What messages call it.
        build: `build(subject, case)`, the function of batched flat arrays.
        settle: `settle(case, outputs)`, the outputs with the axes of the batch in front.
        summed: Whether output i belongs to a leaf and is summed over the axes that do not map it: the leaf's place.
    """

    name: str
    build: Callable[[Subject, Case], Callable[..., list[Any]]]
    settle: Callable[[Case, list[Array]], list[Array]]
    summed: tuple[int, ...] | None = None


@dataclass(eq=False)
class Target:
    """A function of one element, the subject's or a derivative, whose batches are compared with its own calls.

    Attributes:
        subject: What is checked.
        label: What messages call the function, such as "the vjp of simulate".
        leaves: Its arguments.
        derive: Makes it of the subject's function.
        outputs: The names of its outputs.
        tolerance: How close is close enough.
    """

    subject: Subject
    label: str
    leaves: tuple[Leaf, ...]
    derive: Callable[[Flat], Flat]
    tolerance: Tolerance
    outputs: tuple[str, ...] = ()
    _known: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)

    @property
    def compiles(self) -> bool:
        """Whether its programs are compiled, whatever the way."""
        return self.subject.traced and self.label != self.subject.name

    @functools.cached_property
    def function(self) -> Flat:
        """The function of one element."""
        function = self.derive(self.subject.flat)
        return jax.jit(function) if self.compiles else function

    def alone(self, numbers: Sequence[int]) -> list[Array]:
        """What one element gives, called on its own, once."""
        key = tuple(numbers)
        if key not in self._known:
            self._known[key] = self.call(key)
        return self._known[key]

    def call(self, numbers: Sequence[int]) -> list[Array]:
        """What one element gives, called on its own."""
        values = [leaf.variant(number) for leaf, number in zip(self.leaves, numbers, strict=True)]
        return self.at(values)

    def at(self, values: Sequence[Array]) -> list[Array]:
        """What it gives for these arguments."""
        arrays = [leaf.array(value) for leaf, value in zip(self.leaves, values, strict=True)]
        with original_errors():
            outputs = jax.block_until_ready(self.function(*arrays))
        return [as_numpy(output) for output in outputs]

    def element(self, case: Case, index: Sequence[int]) -> list[Array]:
        """What the element at an index of a batch gives on its own."""
        return self.alone([case.number(leaf, index) for leaf in range(len(self.leaves))])


@dataclass(frozen=True)
class Failure:
    """How a case failed.

    Attributes:
        kind: "error", "warning", "count", "shape", "dtype" or "values".
        text: The error or the warning.
        output: Which output is wrong.
        index: Which element is.
        got: What it should not be.
        wanted: What it should be.
        error: The exception, or the warning.
    """

    kind: str
    text: str = ""
    output: int = 0
    index: tuple[int, ...] = ()
    got: Any = None
    wanted: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Attempt:
    """What a case gave, and what it should have given."""

    wanted: Sequence[Array]
    got: Sequence[Array] = ()
    failure: Failure | None = None


def attempt(target: Target, way: Way, case: Case, subject: Subject | None = None) -> Attempt:
    """Run a case; with another subject than the target's if one is given."""
    wanted = expected(target, way, case)
    got, failure = _run(target, way, case, subject or target.subject)
    if failure is None:
        failure = _wrong(target, case, got, wanted)
    return Attempt(wanted, got, failure)


def _run(target: Target, way: Way, case: Case, subject: Subject) -> tuple[list[Array], Failure | None]:
    try:
        with warnings.catch_warnings(record=True) as caught, original_errors():
            warnings.simplefilter("always")
            program = way.build(subject, case)
            program = jax.jit(program) if target.compiles else program
            outputs = jax.block_until_ready(program(*_arguments(target, case)))
            got = way.settle(case, [as_numpy(output) for output in outputs])
        contract = _without_contract(caught)
    except Exception as error:  # noqa: BLE001  # whatever it is, one-element calls did not raise it: a finding
        return [], Failure("error", f"{type(error).__name__}: {error}", error=error)
    return got, contract


def _without_contract(caught: Sequence[warnings.WarningMessage]) -> Failure | None:
    """Pass warnings on, but for one that says that the function does not handle batches."""
    failure = None
    for warning in caught:
        if issubclass(warning.category, BatchContractWarning):
            text = f"BatchContractWarning: {warning.message}"
            failure = Failure("warning", text, error=Warning(text))
            continue
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return failure


def _arguments(target: Target, case: Case) -> list[Any]:
    values = [case.values(i, leaf) for i, leaf in enumerate(target.leaves)]
    if case.strided:
        # As NumPy has them: JAX would make them contiguous.
        return [v if leaf.key is None else leaf.array(v) for leaf, v in zip(target.leaves, values, strict=True)]
    return [leaf.array(value) for leaf, value in zip(target.leaves, values, strict=True)]


def expected(target: Target, way: Way, case: Case) -> list[Array]:
    """What one-element calls give, with the axes of the batch in front."""
    rows = [target.element(case, index) for index in case.indices]
    example = rows[0] if rows else target.alone([0] * len(target.leaves))
    stacked = []
    for output, alone in enumerate(example):
        flat = np.stack([row[output] for row in rows]) if rows else np.zeros((0, *alone.shape), alone.dtype)
        whole = flat.reshape((*case.sizes, *alone.shape))
        stacked.append(whole if way.summed is None else _summed(whole, case, way.summed[output]))
    return stacked


def _summed(array: Array, case: Case, leaf: int) -> Array:
    over = tuple(level for level in range(len(case.levels)) if level not in case.along(leaf))
    if not over:
        return array
    total = wide(array).sum(axis=over)
    return (total if array.dtype.kind == "c" else total.real).astype(array.dtype)


def _wrong(target: Target, case: Case, got: Sequence[Array], wanted: Sequence[Array]) -> Failure | None:
    """The first thing that is wrong."""
    if len(got) != len(wanted):
        return Failure("count", f"{len(got)} outputs came, and {len(wanted)} were wanted")
    for output, (array, right) in enumerate(zip(got, wanted, strict=True)):
        if array.shape != right.shape:
            return Failure("shape", f"shape {array.shape} came, and {right.shape} was wanted", output)
        if array.dtype != right.dtype:
            return Failure("dtype", f"dtype {array.dtype} came, and {right.dtype} was wanted", output)
    noise = largest([*(leaf.value for leaf in target.leaves), *wanted])
    for output, (array, right) in enumerate(zip(got, wanted, strict=True)):
        close = target.tolerance.close(array, right, noise)
        if not close.all():
            index = _first(close, math.prod(case.sizes), case.sizes)
            return Failure("values", "", output, index, array, right)
    return None


def _first(close: Array, count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the first element with a wrong number; empty where the output is summed."""
    if close.shape[: len(sizes)] != sizes:
        return ()
    rows = close.reshape(count, -1).all(axis=1)
    return tuple(int(i) for i in np.unravel_index(int(np.argmin(rows)), sizes))


def settle_outputs(case: Case, outputs: list[Array]) -> list[Array]:
    """Outputs whose axes are where `out_axes` says."""
    axes = [level.out_axis for level in case.levels]
    return [in_front(output, axes) for output in outputs]


def settle_like_leaves(leaves: Sequence[int]) -> Callable[[Case, list[Array]], list[Array]]:
    """Outputs whose axes are where those of a leaf are."""

    def settle(case: Case, outputs: list[Array]) -> list[Array]:
        return [in_front(output, axes_of(case, leaf)) for output, leaf in zip(outputs, leaves, strict=True)]

    return settle


def vmapped(flat: Flat, case: Case) -> Flat:
    """The function under the vmaps of a case."""
    program = flat
    for level in reversed(case.levels):
        program = jax.vmap(program, level.in_axes, level.out_axis)
    return program
