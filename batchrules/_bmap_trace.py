"""One trace of the mapped function, and what it tells: the program of one element.

The trace is made inside a `jax.vmap`, so that vmap itself checks axes and sizes, and says in its own words what is
wrong.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from batchrules._bmap_axes import Arguments, spread
from batchrules._bmap_body import reached_from, uses, variables
from batchrules._bmap_inline import with_open_jits


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
        consts, known = values[: self.num_consts], values[self.num_consts :]
        return consts, [_plain(x, v.aval) for x, v in zip(known, self.shared.outvars[self.num_consts :], strict=True)]

    @property
    def axis_names(self) -> set[Any]:
        """The names of the axes, the mapped one or others around it, that the function asks for or combines over."""
        return _axis_names(self.shared) | _axis_names(self.jaxpr)

    @property
    def outline(self) -> Any:
        """What the element's program is made of, as a key: where it is the same, so is the memory that it takes."""
        return _outline(self.shared), _outline(self.jaxpr), self.outputs, self.out_axes


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
        # JAX's errors tell where this is from, which is of use if it is the user's function.
        @functools.wraps(fun)
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
    return _cut(with_open_jits(found["closed"]), found["treedef"], spread(out_axes, stacked), jax.tree.leaves(stacked))


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


def _plain(value: Any, aval: Any) -> Any:
    """A constant that the function returns as it is: JAX has classes of its own for those in a program."""
    if isinstance(value, jax.Array | np.generic | bool):
        return value
    if not aval.weak_type:
        return np.asarray(value, aval.dtype)[()]
    kinds: tuple[Any, ...] = (int, float, complex)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


def _read_by(eqns: Sequence[JaxprEqn], known: set[Var]) -> list[Var]:
    return list(dict.fromkeys(v for e in eqns for v in variables(e.invars) if v not in known))


def _axis_names(jaxpr: Any) -> set[Any]:
    """The names of axes that equations anywhere in the program take, and that are not named inside it."""
    names: set[Any] = set()
    for eqn in jaxpr.eqns:
        for key in ("axes", "axis_name"):
            names |= _names_in(eqn.params.get(key))
        # Only `jax.shard_map` has a mesh.
        own = getattr(eqn.params.get("mesh"), "axis_names", ())
        names |= set().union(*map(_axis_names, _inside(eqn.params.values()))).difference(own)
    return names


def _names_in(axes: Any) -> set[Any]:
    each = axes if isinstance(axes, tuple) else (axes,)
    # A position is an int, which a name is not unless someone made it so.
    return {name for name in each if name is not None and not isinstance(name, numbers.Integral | tuple)}


def _outline(jaxpr: Any) -> tuple[Any, ...]:
    """The program's equations and their types, at all depths. Not what else they are told, which might be large."""
    return tuple(
        (
            eqn.primitive.name,
            tuple(str(v.aval) for v in (*eqn.invars, *eqn.outvars)),
            tuple(_outline(inner) for inner in _inside(eqn.params.values())),
        )
        for eqn in jaxpr.eqns
    )


def _inside(params: Iterable[Any]) -> Iterator[Any]:
    """The programs among an equation's parameters."""
    for param in params:
        inner = getattr(param, "jaxpr", param)
        if isinstance(inner, Jaxpr):
            yield inner
        elif isinstance(param, tuple):
            yield from _inside(param)
