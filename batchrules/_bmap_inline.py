"""Jitted functions inside the mapped one, opened where they hide what does not depend on the mapped axis.

Many functions of `jax.numpy` are jitted. Such a call is one equation, which depends on the mapped axis as soon as any
of its inputs does, and then all that it computes would be computed, and kept, for each chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, groupby
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from batchrules._bmap_body import Body, reached_from, trace, uses, variables


def with_open_jits(body: Body) -> Body:
    """The same program, in which no jit computes anything that does not depend on the program's inputs."""
    jaxpr: Jaxpr = body.jaxpr
    mapped = [True] * len(jaxpr.invars)
    if not any(_hiding(jaxpr, mapped)):
        return body

    def opened(*values: Any) -> list[Any]:
        return _evaluate(jaxpr, body.consts, values, mapped)

    return trace(opened, [v.aval for v in jaxpr.invars])


# --- which jits to open ----------------------------------------------------------------------------------------------


def _hiding(jaxpr: Jaxpr, mapped: Sequence[bool]) -> list[bool]:
    """For each equation whether it is a jit that hides something."""
    late = reached_from(compress(jaxpr.invars, mapped), jaxpr.eqns)
    return [uses(eqn, late) and _is_plain_jit(eqn) and _hides(eqn, late) for eqn in jaxpr.eqns]


def _hides(eqn: JaxprEqn, late: set[Var]) -> bool:
    """Whether a jit has results, effects, or steps from its inputs on, that depend on nothing that is late."""
    inner: Jaxpr = eqn.params["jaxpr"].jaxpr
    mapped = _among(eqn.invars, late)
    late = reached_from(compress(inner.invars, mapped), inner.eqns)
    early = reached_from(compress(inner.invars, [not is_late for is_late in mapped]), inner.eqns)
    if any(v not in late for v in variables(inner.outvars)):
        return True
    if any((uses(e, early) or e.effects) and not uses(e, late) for e in inner.eqns):
        return True
    return any(_hiding(inner, mapped))


def _among(atoms: Iterable[Any], some: set[Var]) -> list[bool]:
    return [isinstance(v, Var) and v in some for v in atoms]


@functools.cache
def _example() -> JaxprEqn:
    return jax.make_jaxpr(jax.jit(lambda x: x + 1))(0.0).eqns[0]


def _is_plain_jit(eqn: JaxprEqn) -> bool:
    """Whether an equation is a jit that does not say where anything lies."""
    plain = _example()
    if eqn.primitive is not plain.primitive or eqn.params["jaxpr"].consts:
        return False
    (unspecified,) = plain.params["in_shardings"]
    return all(x is unspecified for x in (*eqn.params["in_shardings"], *eqn.params["out_shardings"]))


# --- the program without them ----------------------------------------------------------------------------------------


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], mapped: Sequence[bool]) -> list[Any]:
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    late = reached_from(compress(jaxpr.invars, mapped), jaxpr.eqns)
    rest = list(zip(jaxpr.eqns, _hiding(jaxpr, mapped), strict=True))
    for hides, group in groupby(rest.copy(), key=lambda pair: pair[1]):
        eqns = [eqn for eqn, _ in group]
        del rest[: len(eqns)]
        if not hides:
            known |= _run_as_they_are(jaxpr, eqns, [eqn for eqn, _ in rest], known)
            continue
        for eqn in eqns:
            inner = eqn.params["jaxpr"].jaxpr
            found = _evaluate(inner, (), [_read(v, known) for v in eqn.invars], _among(eqn.invars, late))
            known |= zip(eqn.outvars, found, strict=True)
    return [_read(v, known) for v in jaxpr.outvars]


def _run_as_they_are(
    jaxpr: Jaxpr, eqns: Sequence[JaxprEqn], later: Sequence[JaxprEqn], known: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Run equations of a program. The variables that equations after them, or the program's results, need."""
    given = [v for v in dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars)) if v in known]
    needed = {v for atoms in (*(eqn.invars for eqn in later), jaxpr.outvars) for v in variables(atoms)}
    made = [v for eqn in eqns for v in eqn.outvars if v in needed]
    part = jaxpr.replace(constvars=[], invars=given, eqns=list(eqns), outvars=made)
    return dict(zip(made, eval_jaxpr(part, (), *(known[v] for v in given)), strict=True))


def _read(v: Any, known: Mapping[Any, Any]) -> Any:
    return v.val if isinstance(v, Literal) else known[v]
