"""Which derivatives a function has, and all checks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from batchrules._errors import DerivativeError, NotDifferentiableError
from batchrules._testing_check import Checker
from batchrules._testing_derivatives import MOST_NUMBERS, Derivatives, Part
from batchrules._testing_numeric import (
    Finding,
    Numeric,
    check_adjoint,
    check_jacobian,
    check_jvp,
    check_linear,
    check_vjp,
    slopes,
)
from batchrules._testing_run import Target
from batchrules._testing_ways import Space

MODES = ("jvp", "vjp")
# What JAX says where a function has no rule for a mode: a custom_vjp has no jvp, a pure_callback neither.
_HAS_NONE = ("custom_vjp", "do not support JVP", "not support JVP", "Differentiation rule")


@dataclass(frozen=True, eq=False)
class Request:
    """What to check.

    Attributes:
        target: The function.
        space: What there is to map.
        endpoints: The modes that must be there; None for those that are.
        seed: What directions follow from.
        prefix: What is put before every cause: the method, where there are several.
    """

    target: Target
    space: Space
    endpoints: Sequence[str] | None
    seed: int
    prefix: str = ""


def check_derivatives(checker: Checker, request: Request) -> None:
    """Every mode that the function has: of one element, and of batches."""
    modes = MODES if request.endpoints is None else [mode for mode in MODES if mode in request.endpoints]
    found = {mode: _part(checker, request, mode) for mode in modes}
    parts = {mode: part for mode, part in found.items() if part is not None}
    for mode, part in parts.items():
        _check_mode(checker, request, mode, part)
    if len(parts) == len(MODES) and len(set(parts.values())) == 1:
        numeric = Numeric(Derivatives(request.target, request.space, parts["jvp"], request.seed))
        _one(checker, request, "vjp", partial(check_adjoint, numeric))


def _check_mode(checker: Checker, request: Request, mode: str, part: Part) -> None:
    derivatives = Derivatives(request.target, request.space, part, request.seed)
    numeric = Numeric(derivatives)
    _against_differences(checker, request, mode, numeric)
    plans = [derivatives.jvp()] if mode == "jvp" else [derivatives.vjp()]
    if mode == "jvp":
        _one(checker, request, mode, partial(check_linear, numeric))
    elif not all(request.space.outputs[o].dtype.kind == "c" for o in part.seen):
        plans.append(derivatives.grad())
    if derivatives.has_jacobian:
        name, transform = ("jacfwd", jax.jacfwd) if mode == "jvp" else ("jacrev", jax.jacrev)
        _one(checker, request, name, partial(check_jacobian, numeric, name))
        plans.append(derivatives.jacobian(name, transform))
    else:
        checker.report.leave_out(f"Jacobians: they are complex, or have more than {MOST_NUMBERS} numbers")
    for target, plan in plans:
        checker.run(target, plan, request.prefix)


def _against_differences(checker: Checker, request: Request, mode: str, numeric: Numeric) -> None:
    if numeric.coarse is not None:
        checker.report.leave_out(f"differences of calls against derivatives: {numeric.coarse} is too coarse for them")
        return
    check = check_jvp if mode == "jvp" else check_vjp
    for leaf in numeric.derivatives.part.moving:
        known = [(values, slope) for values, slope in slopes(numeric, leaf) if slope.certain]
        if known:
            _one(checker, request, mode, partial(check, numeric, leaf, known))
            continue
        name = request.target.leaves[leaf].name
        checker.report.leave_out(f"differences of calls in {name}: the function is too rough there, or not finite")


def _one(checker: Checker, request: Request, mode: str, check: Callable[[], Finding | None]) -> None:
    """One check of one element; what it raises is a finding too."""
    checker.report.counts[f"{mode} of one element"] += 1
    try:
        finding = check()
    except Exception as error:  # noqa: BLE001  # the function itself did not raise it: a finding
        values = tuple(leaf.value for leaf in request.target.leaves)
        finding = Finding(mode, f"the {mode} of one element fails", f"{type(error).__name__}: {error}", values)
    if finding is not None:
        cause = request.prefix + finding.cause
        checker.add(request.target, Finding(finding.mode, cause, finding.evidence, finding.values))


def _part(checker: Checker, request: Request, mode: str) -> Part | None:
    """The leaves and outputs that have derivatives; None where the mode is not there."""
    target, outputs = request.target, request.space.outputs
    leaves = [i for i, leaf in enumerate(target.leaves) if leaf.inexact]
    inexact = [o for o, output in enumerate(outputs) if jnp.issubdtype(output.dtype, np.inexact)]
    pairs = {
        (leaf, o): _trial(request, mode, Part(len(target.leaves), (leaf,), (o,))) for leaf in leaves for o in inexact
    }
    if not pairs:
        checker.report.leave_out("derivatives: no argument, or no output, is a floating-point or complex array")
        return None
    moving = tuple(i for i in leaves if any(pairs[i, o] is None for o in inexact))
    seen = tuple(o for o in inexact if any(pairs[i, o] is None for i in leaves))
    for (leaf, output), error in pairs.items():
        if error is not None:
            _note_missing(checker, request, mode, (leaf, output), error)
    return Part(len(target.leaves), moving, seen) if moving else None


def _note_missing(checker: Checker, request: Request, mode: str, pair: tuple[int, int], error: Exception) -> None:
    leaf, output = request.target.leaves[pair[0]].name, request.target.outputs[pair[1]]
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, NotDifferentiableError):
        checker.report.leave_out(f"the {mode} of {output} in {leaf}, declared not to be differentiable")
        return
    absent = isinstance(error, DerivativeError | NotImplementedError) or any(text in str(error) for text in _HAS_NONE)
    if absent and request.endpoints is None:
        # A function without any endpoint says so once, and not once for each mode.
        kind = "derivatives" if "cannot be differentiated" in said else mode
        checker.report.leave_out(f"{kind}: {said.splitlines()[0].partition('. ')[0]}")
        return
    cause = (
        f"{request.prefix}the {mode} of {leaf} is not there"
        if absent
        else f"{request.prefix}the {mode} of {leaf} fails"
    )
    program = f"jax.{mode} of {request.target.subject.name}, one element"
    checker.found(cause, program, said, f"{mode} of one element")


def _trial(request: Request, mode: str, part: Part) -> Exception | None:
    """What it raises to differentiate one output in one leaf."""
    derivatives = Derivatives(request.target, request.space, part, request.seed)
    target = (derivatives.jvp() if mode == "jvp" else derivatives.vjp())[0]
    try:
        target.alone([0] * len(target.leaves))
    except Exception as error:  # noqa: BLE001  # told apart by the caller
        return error
    return None
