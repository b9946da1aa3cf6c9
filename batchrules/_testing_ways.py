"""The ways to batch a function, and the cases that each is tried with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from batchrules import _testing_cases as cases
from batchrules._bmap import bmap
from batchrules._testing_cases import Axes, Case
from batchrules._testing_leaves import Array, Leaf
from batchrules._testing_run import Flat, Subject, Way, settle_outputs, vmapped

Plan = list[tuple[Way, list[Case]]]
_CHUNKED = 5  # two chunks of two, and one that remains


@dataclass(frozen=True)
class Space:
    """What there is to map.

    Attributes:
        leaves: The arguments.
        outputs: What one element gives.
        patterns: The choices of mapped leaves, with their axes; the fewest first.
        nests: Whether nested vmaps over different leaves are promised to work.
    """

    leaves: tuple[Leaf, ...]
    outputs: Sequence[Array]
    patterns: list[Axes]
    nests: bool = True

    @property
    def zero_based(self) -> list[Axes]:
        """The patterns, with every mapped axis in front: for a derivative, or a second vmap."""
        plain = [tuple(None if axis is None else 0 for axis in pattern) for pattern in self.patterns]
        return list(dict.fromkeys(plain))

    @property
    def nested(self) -> list[Case]:
        """Nested vmaps that are promised to work."""
        found = cases.nested(self.zero_based)
        return [case for case in found if self.nests or len(set(case.pattern)) == 1]


def _vmap(subject: Subject, case: Case) -> Flat:
    return vmapped(subject.flat, case)


def _jit_of_vmap(subject: Subject, case: Case) -> Flat:
    # A function of its own, or jit would give the program that it compiled for another rule.
    return jax.jit(vmapped(_fresh(subject.flat), case))


def _vmap_of_jit(subject: Subject, case: Case) -> Flat:
    return vmapped(jax.jit(_fresh(subject.flat)), case)


def _chunks(subject: Subject, case: Case) -> Flat:
    if subject.chunked is not None:
        return vmapped(subject.chunked, case)
    program: Any = subject.flat
    for level in reversed(case.levels):
        program = bmap(program, level.in_axes, level.out_axis, batch_size=2)
    return program


def _fresh(flat: Flat) -> Flat:
    def function(*arrays: Any) -> list[Any]:
        return flat(*arrays)

    return function


VMAP = Way("vmap", _vmap, settle_outputs)
NESTED = Way("nested vmap", _vmap, settle_outputs)
JIT = Way("jit", _jit_of_vmap, settle_outputs)
JIT_OF_VMAP = Way("jit of vmap", _jit_of_vmap, settle_outputs)
JIT_OF_NESTED = Way("jit of nested vmap", _jit_of_vmap, settle_outputs)
VMAP_OF_JIT = Way("vmap of jit", _vmap_of_jit, settle_outputs)
BATCH_SIZE = Way("batch_size=2", _chunks, settle_outputs)


def plan(space: Space) -> Plan:
    """The ways to batch the function itself."""
    patterns, leaves = space.patterns, space.leaves
    sizes = cases.batch_sizes(leaves, space.outputs)
    moved = list(dict.fromkeys([*patterns[: len(leaves)], patterns[-1]]))
    single = [*cases.one_level(patterns, sizes), *cases.other_axes(moved, leaves), *cases.edges(patterns)]
    nested = space.nested
    return [
        (VMAP, [case for case in single if space.nests or len(set(case.pattern)) == 1]),
        (JIT, [Case(())]),
        (JIT_OF_VMAP, cases.one_level(patterns, [2])),
        (VMAP_OF_JIT, cases.most(patterns, 2)),
        (BATCH_SIZE, cases.one_level(patterns, [_CHUNKED])),
        (NESTED, nested),
        (JIT_OF_NESTED, [nested[0], nested[-2], nested[-1]]),
    ]


def derived(name: str, derive: Callable[[Flat], Flat]) -> tuple[Way, Way]:
    """`vmap` of a derivative, and `jit` of that."""

    def build(subject: Subject, case: Case) -> Flat:
        return vmapped(derive(subject.flat), case)

    def compiled(subject: Subject, case: Case) -> Flat:
        return jax.jit(vmapped(derive(subject.flat), case))

    of_vmap = Way(f"vmap of {name}", build, settle_outputs)
    return of_vmap, Way(f"jit of vmap of {name}", compiled, settle_outputs)
