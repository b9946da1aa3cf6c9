"""One trace of the mapped function, and what it tells: the program of one element.

The trace is made inside a `jax.vmap`, so that vmap itself checks axes and sizes, and says in its own words what is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from batchrules._bmap_axes import Arguments, spread
from batchrules._bmap_body import reached_from, uses, variables


@dataclass(frozen=True)
class Element:
    """The program of one element, cut in two: what does not depend on the mapped axis, and the rest.

    `shared` (inputs: the values that the function closes over, in `closed`) runs once. `jaxpr` runs for each
    element; its inputs are shared's outputs and the mapped leaves. An output of the function is an int, which counts
    the outputs of `jaxpr`, or a `Shared`.
    """

    closed: tuple[Any, ...]
    shared: Jaxpr
    jaxpr: Jaxpr
    num_consts: int
    outputs: tuple[int | Shared, ...]
    out_axes: tuple[Any, ...]
    results: tuple[Any, ...]
    treedef: Any

    def share(self, closed: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Run what does not depend on the mapped axis: the loop's constants, and the outputs that are known with it."""
        values = eval_jaxpr(self.shared, (), *closed)
        return values[: self.num_consts], values[self.num_consts :]

    def has_collective_over(self, axis_name: Any) -> bool:
        """Whether the function combines elements, or asks for their place, by the mapped axis's name."""
        jaxprs = (self.shared, self.jaxpr)
        return axis_name is not None and any(_mentions(jaxpr, axis_name) for jaxpr in jaxprs)


@dataclass(frozen=True)
class Shared:
    """An output that does not depend on the mapped axis: its number among `share`'s."""

    index: int


def trace_element(
    fun: Callable[..., Any],
    arguments: Arguments,
    vmap: Callable[[Callable[..., Any], Any, Any], Callable[..., Any]],
    out_axes: Any,
    reduced: Callable[[Any], set[int]] | None,
) -> Element:
    """Trace the function once. `vmap(fun, in_axes, out_axes)` is `jax.vmap` with the user's other arguments.

    `reduced` tells from the output's structure which of its leaves are reduced: `out_axes` plays no role for these.
    """
    found: dict[str, Any] = {}

    def traced(*mapped: Any) -> Any:
        def flat(*values: Any) -> list[Any]:
            leaves, found["treedef"] = jax.tree.flatten(arguments.call(fun, values))
            return leaves

        found["closed"] = jax.make_jaxpr(flat)(*mapped)
        return again(*mapped)

    def again(*mapped: Any) -> Any:
        closed = found["closed"]
        return jax.tree.unflatten(found["treedef"], eval_jaxpr(closed.jaxpr, closed.consts, *mapped))

    in_axes = tuple(arguments.mapped_axes)
    if reduced is None:
        stacked = jax.eval_shape(vmap(traced, in_axes, out_axes), *arguments.mapped)
    else:
        jax.eval_shape(vmap(lambda *mapped: (traced(*mapped), ())[1], in_axes, 0), *arguments.mapped)
        out_axes = _with_front(out_axes, found["treedef"], reduced(found["treedef"]))
        stacked = jax.eval_shape(vmap(again, in_axes, out_axes), *arguments.mapped)
    return _cut(found["closed"], found["treedef"], spread(out_axes, stacked), jax.tree.leaves(stacked))


def _with_front(out_axes: Any, treedef: Any, leaves: set[int]) -> Any:
    """`out_axes` with 0 for some leaves of the output; as it is where it does not fit, so that vmap says so."""
    try:
        axes = spread(out_axes, jax.tree.unflatten(treedef, range(treedef.num_leaves)))
    except ValueError:
        return out_axes
    return jax.tree.unflatten(treedef, [0 if i in leaves else axis for i, axis in enumerate(axes)])


def _cut(closed: Any, treedef: Any, out_axes: Sequence[Any], results: Sequence[Any]) -> Element:
    jaxpr: Jaxpr = closed.jaxpr
    mapped = reached_from(jaxpr.invars, jaxpr.eqns)
    before = [e for e in jaxpr.eqns if not uses(e, mapped)]
    inside = [e for e in jaxpr.eqns if uses(e, mapped)]
    in_loop = [v for v in jaxpr.outvars if isinstance(v, Var) and v in mapped]
    known = [v for v in jaxpr.outvars if isinstance(v, Literal) or v not in mapped]
    consts = _read_by(inside, known=mapped)
    body = jaxpr.replace(constvars=[], invars=[*consts, *jaxpr.invars], eqns=inside, outvars=in_loop)
    counts = [0, 0]
    outputs: list[int | Shared] = []
    for v in jaxpr.outvars:
        is_mapped = isinstance(v, Var) and v in mapped
        outputs.append(counts[1] if is_mapped else Shared(counts[0]))
        counts[is_mapped] += 1
    return Element(
        closed=tuple(closed.consts),
        shared=jaxpr.replace(constvars=[], invars=list(jaxpr.constvars), eqns=before, outvars=[*consts, *known]),
        jaxpr=body,
        num_consts=len(consts),
        outputs=tuple(outputs),
        out_axes=tuple(out_axes),
        results=tuple(results),
        treedef=treedef,
    )


def _read_by(eqns: Sequence[JaxprEqn], known: set[Var]) -> list[Var]:
    return list(dict.fromkeys(v for e in eqns for v in variables(e.invars) if v not in known))


def _mentions(jaxpr: Any, axis_name: Any) -> bool:
    """Whether an equation anywhere in the program takes this axis name."""
    return any(_is_over(eqn, axis_name) or _holds(eqn.params.values(), axis_name) for eqn in jaxpr.eqns)


def _is_over(eqn: JaxprEqn, axis_name: Any) -> bool:
    for key in ("axes", "axis_name"):
        names = eqn.params.get(key, ())
        # A position is an int, which a name is not unless someone made it so.
        if any(
            type(name) is not int and name == axis_name for name in (names if isinstance(names, tuple) else (names,))
        ):
            return True
    return False


def _holds(params: Iterable[Any], axis_name: Any) -> bool:
    for param in params:
        inner = getattr(param, "jaxpr", param)
        if isinstance(inner, Jaxpr) and _mentions(inner, axis_name):
            return True
        if isinstance(param, tuple) and _holds(param, axis_name):
            return True
    return False
