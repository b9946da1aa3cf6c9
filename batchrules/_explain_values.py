"""Which values of a program are equal, and which change within a loop: what a compiler knows of it before it runs.

XLA makes equal calls once, and takes a call that is the same in every pass of a loop out of the loop. It can find more
equal than this does (`x + 0` is `x`), so what is found here bounds what is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from batchrules._values import Static

_numbers = itertools.count()


class Value(NamedTuple):
    """A value of a program.

    Attributes:
        number: Equal values have equal numbers.
        level: How deep the innermost loop is that it changes in; 0 for none.
        serial: How deep the innermost loop is that it depends on an earlier pass of; 0 for none.
    """

    number: int
    level: int
    serial: int


def fresh(of: Iterable[Value] = ()) -> Value:
    """A value that is equal to no other, and changes where these do."""
    values = tuple(of)
    level = max((value.level for value in values), default=0)
    return Value(next(_numbers), level, max((value.serial for value in values), default=0))


def jaxpr_of(closed: Any) -> Any:
    """The jaxpr inside a closed one; from jax 0.12 on they are one class."""
    return getattr(closed, "jaxpr", closed)


def consts_of(closed: Any) -> Sequence[Any]:
    """The constants of a closed jaxpr; none for an open one."""
    return getattr(closed, "consts", ())


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter is a jaxpr, open or closed."""
    return hasattr(value, "eqns") and (hasattr(value, "invars") or hasattr(value, "jaxpr"))


def jaxprs_in(value: Any) -> list[Any]:
    """All jaxprs in a parameter, in tuples, lists and dicts of parameters, and in those of a HiJAX primitive."""
    if is_jaxpr(value):
        return [value]
    if isinstance(getattr(value, "params", None), dict):
        value = value.params
    if isinstance(value, dict):
        value = tuple(value.values())
    return [found for part in value for found in jaxprs_in(part)] if isinstance(value, tuple | list) else []


def equations_in(jaxpr: Any) -> Iterable[Any]:
    """All equations of a jaxpr, those of the jaxprs in them included."""
    for eqn in jaxpr_of(jaxpr).eqns:
        yield eqn
        for inner in jaxprs_in(tuple(eqn.params.values())):
            yield from equations_in(inner)


def fits(closed: Any, eqn: Any) -> bool:
    """Whether an equation runs this program on its operands, once: `jit`, `checkpoint`, `custom_vjp` and the like."""
    jaxpr = jaxpr_of(closed)
    inside, outside = ([*jaxpr.invars, *jaxpr.outvars], [*eqn.invars, *eqn.outvars])
    # The program in a `reduce` may have as many operands, but they are numbers.
    return len(jaxpr.invars) == len(eqn.invars) and list(map(_shape, inside)) == list(map(_shape, outside))


def _shape(atom: Any) -> Any:
    return getattr(atom.aval, "shape", None)


def behind_barrier(eqn: Any, given: list[Value]) -> list[Value]:
    """The operands, which differ from equal ones outside where `checkpoint` forbids to take those."""
    is_barrier = eqn.params.get("differentiated") and eqn.params.get("prevent_cse")
    return [fresh([value]) for value in given] if is_barrier else given


@dataclass
class Names:
    """Gives equal things equal keys, whatever they are."""

    _known: dict[Hashable, int] = field(default_factory=dict)
    # Kept alive: a new object may have the identity of one that is gone.
    _kept: list[Any] = field(default_factory=list)

    def literal(self, value: Any) -> int:
        """The number of a constant in a program."""
        array = np.asarray(value) if np.ndim(value) == 0 and hasattr(value, "dtype") else value
        key = (array.dtype.str, array.tobytes()) if isinstance(array, np.ndarray) else self._by_identity(value)
        return self._number(("literal", key))

    def equation(self, eqn: Any, operands: Sequence[Hashable]) -> Hashable:
        """The key of an equation over these operands."""
        params = tuple((name, self._param(value)) for name, value in sorted(eqn.params.items()))
        types = tuple(str(variable.aval) for variable in eqn.outvars)
        return eqn.primitive, params, tuple(operands), types

    def _number(self, key: Hashable) -> int:
        if key not in self._known:
            self._known[key] = next(_numbers)
        return self._known[key]

    def _by_identity(self, value: Any) -> Hashable:
        self._kept.append(value)
        return "object", id(value)

    def _param(self, value: Any) -> Hashable:
        if is_jaxpr(value):
            return "jaxpr", self._number(self._program(value))
        if isinstance(value, tuple | list):
            return type(value).__name__, tuple(self._param(part) for part in value)
        if isinstance(value, dict):
            return "dict", tuple((str(name), self._param(part)) for name, part in value.items())
        static = Static(value)
        try:
            hash(static)
        except TypeError:
            return self._by_identity(value)
        return static

    def _program(self, closed: Any) -> Hashable:
        """What a program does, whatever its variables are called."""
        jaxpr = jaxpr_of(closed)
        consts = tuple(self._by_identity(const) for const in consts_of(closed))
        names: dict[Any, Hashable] = {}
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            names[variable] = len(names)

        def name_of(atom: Any) -> Hashable:
            return ("literal", self.literal(atom.val)) if hasattr(atom, "val") else names[atom]

        steps = []
        for eqn in jaxpr.eqns:
            steps.append(self.equation(eqn, [name_of(atom) for atom in eqn.invars]))
            for variable in eqn.outvars:
                names[variable] = len(names)
        types = tuple(str(variable.aval) for variable in jaxpr.invars)
        return consts, types, tuple(steps), tuple(name_of(atom) for atom in jaxpr.outvars)
