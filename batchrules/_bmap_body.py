"""The program of one chunk, a jaxpr: what it depends on, what of it is needed, and what can be known of it early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend import linear_util
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.interpreters import partial_eval as pe

from batchrules._jax_versions import closed_like

Body = Any  # a closed jaxpr, whose class differs between versions of JAX


def trace(fun: Callable[..., Any], types: Sequence[Any]) -> Body:
    """The program of a function of flat arguments with these types."""
    return jax.make_jaxpr(fun)(*types)


def run(body: Body, operands: Iterable[Any]) -> list[Any]:
    """The program's outputs."""
    return jaxpr_as_fun(body)(*operands)


# --- what depends on what --------------------------------------------------------------------------------------------


def variables(atoms: Iterable[Any]) -> list[Var]:
    """Those that are no literals."""
    return [v for v in atoms if isinstance(v, Var)]


def uses(eqn: JaxprEqn, some: set[Var]) -> bool:
    """Whether an equation reads any of these variables."""
    return any(v in some for v in variables(eqn.invars))


def reached_from(start: Iterable[Var], eqns: Iterable[JaxprEqn]) -> set[Var]:
    """The variables that depend on any of these, themselves included."""
    reached = set(start)
    for eqn in eqns:
        if uses(eqn, reached):
            reached.update(eqn.outvars)
    return reached


def depends(body: Body, on: Sequence[bool]) -> list[bool]:
    """Which outputs depend on the inputs that are marked."""
    jaxpr: Jaxpr = body.jaxpr
    reached = reached_from(compress(jaxpr.invars, on), jaxpr.eqns)
    return [isinstance(v, Var) and v in reached for v in jaxpr.outvars]


def needed_for(jaxpr: Jaxpr, wanted: Iterable[Any]) -> list[JaxprEqn]:
    """The equations that some variables depend on, in order."""
    needed, kept = set(variables(wanted)), []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(variables(eqn.invars))
            kept.append(eqn)
    return kept[::-1]


# --- less of a program -----------------------------------------------------------------------------------------------


def with_outputs(body: Body, wanted: Sequence[bool]) -> Body:
    """The program of some of the outputs, of all inputs."""
    return prune(body, wanted, keep=True)[0]


def alone(body: Body, wanted: Sequence[int]) -> tuple[Body, list[bool]]:
    """The program of these outputs, without effects of anything else, of the inputs it needs; and which these are."""
    jaxpr: Jaxpr = body.jaxpr
    outputs = [jaxpr.outvars[i] for i in wanted]
    eqns = needed_for(jaxpr, outputs)
    read = {v for atoms in (outputs, *(eqn.invars for eqn in eqns)) for v in variables(atoms)}
    used = [v in read for v in jaxpr.invars]
    return closed_like(body, jaxpr.replace(invars=list(compress(jaxpr.invars, used)), eqns=eqns, outvars=outputs)), used


def prune(body: Body, wanted: Sequence[bool], *, keep: bool | Sequence[bool] = False) -> tuple[Body, list[bool]]:
    """The program of some of the outputs, of the inputs that it needs or that are to be kept; and which these are."""
    jaxpr, used = pe.dce_jaxpr(body.jaxpr, list(wanted), instantiate=keep if isinstance(keep, bool) else list(keep))
    return closed_like(body, jaxpr), used


# --- what is known before the rest -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A program cut in two: what needs only inputs that are known, and the rest.

    `known` gives the outputs that are known, and then the residuals. `rest(residuals, inputs)` gives the others.
    """

    known: Body
    unknown_outputs: tuple[bool, ...]
    num_residuals: int
    rest: Callable[[Sequence[Any], Sequence[Any]], list[Any]]


def cut(body: Body, unknown: Sequence[bool], unknown_outputs: Sequence[bool]) -> Cut:
    """Cut a program by its unknown inputs. The outputs marked are unknown in any case."""
    found: dict[str, Any] = {}

    def flat(*operands: Any) -> list[Any]:
        return run(body, operands)

    def known(*values: Any) -> list[Any]:
        given = iter(values)
        operands = [
            pe.PartialVal.unknown(aval) if is_unknown else pe.PartialVal.known(next(given))
            for aval, is_unknown in zip(body.in_avals, unknown, strict=True)
        ]
        fun = linear_util.wrap_init(flat, debug_info=jax.api_util.debug_info("bmap", flat, tuple(body.in_avals), {}))
        found["rest"], outputs, residuals = pe.trace_to_jaxpr_nounits(fun, operands, list(unknown_outputs))
        found["unknown"] = tuple(not output.is_known() for output in outputs)
        found["count"] = len(residuals)
        return [*(output.get_known() for output in outputs if output.is_known()), *residuals]

    types = [aval for aval, is_unknown in zip(body.in_avals, unknown, strict=True) if not is_unknown]
    program = trace(known, types)
    jaxpr = found["rest"]
    # Up to jax 0.11 residuals are constants of the program, from 0.12 on they are its first inputs.
    num_consts = len(jaxpr.constvars)

    def rest(residuals: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        return eval_jaxpr(jaxpr, residuals[:num_consts], *residuals[num_consts:], *inputs)

    return Cut(program, found["unknown"], found["count"], rest)


def cut_to_run_again(body: Body, unknown: Sequence[bool], unknown_outputs: Sequence[bool]) -> Cut:
    """Cut a program such that the rest computes what it needs again: its residuals are inputs."""
    first = cut(body, unknown, unknown_outputs)
    num_known = first.unknown_outputs.count(False)
    early = with_outputs(first.known, [True] * num_known + [False] * first.num_residuals)
    late, used = prune(body, first.unknown_outputs)
    kept = [needed for needed, is_unknown in zip(used, unknown, strict=True) if not is_unknown]

    def known(*values: Any) -> list[Any]:
        return [*run(early, values), *compress(values, kept)]

    def rest(residuals: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        old, new = iter(residuals), iter(inputs)
        given = [(next(new) if is_unknown else None, is_unknown) for is_unknown in unknown]
        operands = [
            x if is_unknown else next(old) for (x, is_unknown), needed in zip(given, used, strict=True) if needed
        ]
        return run(late, operands)

    return Cut(trace(known, early.in_avals), first.unknown_outputs, sum(kept), rest)
