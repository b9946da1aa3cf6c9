"""The batches that a check tries, from small to large, and how the arrays of one are laid out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchrules._testing_leaves import Array, Leaf

Axes = tuple[int | None, ...]

# More arguments than this are not mapped in every combination: there would be too many.
_MOST_COMBINED = 4
_LARGEST_SIZE = 8


@dataclass(frozen=True)
class Level:
    """One `jax.vmap`: its size, the axis of each leaf or None, and the axis of all outputs."""

    size: int
    in_axes: Axes
    out_axis: int = 0


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        levels: The vmaps, the outermost first.
        equal: Whether all elements are the example.
        strided: Whether the arrays are NumPy's and their memory is not contiguous.
        replaced: Values, by leaf and place, that are others than usual: to see what depends on them.
    """

    levels: tuple[Level, ...]
    equal: bool = False
    strided: bool = False
    replaced: frozenset[tuple[int, int]] = frozenset()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the vmaps, the outermost first."""
        return tuple(level.size for level in self.levels)

    @property
    def indices(self) -> Iterator[tuple[int, ...]]:
        """The index of each element."""
        return itertools.product(*map(range, self.sizes))

    def along(self, leaf: int) -> list[int]:
        """The levels that map a leaf."""
        return [i for i, level in enumerate(self.levels) if level.in_axes[leaf] is not None]

    @property
    def pattern(self) -> tuple[tuple[bool, ...], ...]:
        """Which leaves each level maps."""
        return tuple(tuple(axis is not None for axis in level.in_axes) for level in self.levels)

    @property
    def weight(self) -> tuple[int, ...]:
        """Small for a case that is easy to read."""
        mapped = sum(sum(flags) for flags in self.pattern)
        odd = sum(axis not in {None, 0} for level in self.levels for axis in (*level.in_axes, level.out_axis))
        # An empty batch shows nothing, and one of a single element less than one of two.
        size = math.prod(self.sizes)
        return len(self.levels), mapped, size, odd, self.equal, self.strided

    def number(self, leaf: int, index: Sequence[int]) -> int:
        """Which value a leaf has in an element."""
        if self.equal:
            return 0
        place = 0
        for level in self.along(leaf):
            place = place * self.levels[level].size + index[level]
        # Numbers that no batch of ours reaches.
        return place + 1000 if (leaf, place) in self.replaced else place

    def values(self, leaf: int, of: Leaf) -> Array:
        """The batched values of a leaf, its axes where the levels want them."""
        along = self.along(leaf)
        index = [0] * len(self.levels)
        rows = []
        for place in itertools.product(*(range(self.levels[level].size) for level in along)):
            for level, i in zip(along, place, strict=True):
                index[level] = i
            rows.append(of.variant(self.number(leaf, index)))
        sizes = [self.levels[level].size for level in along]
        stacked = np.stack(rows) if rows else np.zeros((0, *of.value.shape), of.value.dtype)
        placed = _placed(
            stacked.reshape((*sizes, *of.value.shape)),
            [self.levels[level].in_axes[leaf] or 0 for level in along],
            len(of.shape),
        )
        return not_contiguous(placed) if self.strided else placed


def _placed(array: Array, axes: Sequence[int], rank: int) -> Array:
    """Move the axes in front to where they belong, the innermost first."""
    for lead in reversed(range(len(axes))):
        rank += 1
        array = np.moveaxis(array, lead, lead + axes[lead] % rank)
    return array


def in_front(array: Array, axes: Sequence[int]) -> Array:
    """Move axes to the front, the outermost first."""
    for lead, axis in enumerate(axes):
        array = np.moveaxis(array, lead + axis % (array.ndim - lead), lead)
    return array


def not_contiguous(array: Array) -> Array:
    """The same values, backwards and with gaps in memory."""
    if not array.ndim or not array.size:
        return array
    with_gaps = np.repeat(array, 2, axis=-1)[..., ::2]
    return with_gaps[::-1].copy(order="F")[::-1]


def all_patterns(leaves: Sequence[Leaf]) -> list[Axes]:
    """Every choice of mapped leaves, the fewest first; of many leaves: each alone, all, and all but one."""
    count = len(leaves)
    sizes = range(1, count + 1) if count <= _MOST_COMBINED else (1, count - 1, count)
    return [_mapping(chosen, count) for size in sizes for chosen in itertools.combinations(range(count), size)]


def _mapping(chosen: Sequence[int], count: int) -> Axes:
    return tuple(0 if i in chosen else None for i in range(count))


def batch_sizes(leaves: Sequence[Leaf], outputs: Sequence[Array]) -> list[int]:
    """One, few, and the sizes of the arrays' own dimensions, with which a batch may be lined up in silence."""
    own = {size for array in [*(leaf.value for leaf in leaves), *outputs] for size in array.shape}
    return sorted({1, 2, 3} | {size for size in own if 0 < size <= _LARGEST_SIZE})


def one_level(patterns: Sequence[Axes], sizes: Sequence[int]) -> list[Case]:
    """Each pattern with each size."""
    return [Case((Level(size, pattern),)) for pattern in patterns for size in sizes]


def other_axes(patterns: Sequence[Axes], leaves: Sequence[Leaf]) -> list[Case]:
    """Mapped axes in the last place, counted from either end, and outputs with theirs last."""
    cases = []
    for pattern in patterns:
        last = tuple(None if axis is None else len(leaf.shape) for axis, leaf in zip(pattern, leaves, strict=True))
        from_end = tuple(None if axis is None else -1 for axis in pattern)
        first = tuple(
            None if axis is None else -len(leaf.shape) - 1 for axis, leaf in zip(pattern, leaves, strict=True)
        )
        cases += [Case((Level(2, axes, out),)) for axes, out in {(last, 0): 0, (from_end, -1): 0, (first, -1): 0}]
    return cases


def nested(patterns: Sequence[Axes]) -> list[Case]:
    """Two vmaps, in both orders, over the same leaves and over others; and three."""
    few = _few(patterns)
    pairs = [pair for pair in itertools.product(few, few) if pair[0] != pair[1] or pair[0] == few[-1]]
    cases = [Case((Level(2, outer), Level(3, inner))) for outer, inner in pairs]
    swapped = [replace(case.levels[0], size=3) for case in cases], [replace(c.levels[1], size=2) for c in cases]
    cases += [Case((outer, inner)) for outer, inner in zip(*swapped, strict=True)]
    return [*cases, Case((Level(2, few[-1]), Level(1, few[0]), Level(2, few[-1])))]


def _few(patterns: Sequence[Axes]) -> list[Axes]:
    """The simplest patterns, and the one that maps most."""
    return list(dict.fromkeys([*patterns[:3], patterns[-1]]))


def edges(patterns: Sequence[Axes]) -> list[Case]:
    """No elements, equal elements, and memory that is not contiguous."""
    few = list(dict.fromkeys([patterns[0], patterns[-1]]))
    empty = [Case((Level(0, pattern),)) for pattern in patterns]
    equal = [Case((Level(2, pattern),), equal=True) for pattern in few]
    strided = [Case((Level(2, pattern),), strided=True) for pattern in few]
    return [*empty, *equal, *strided, Case((Level(2, patterns[-1]), Level(0, patterns[-1])))]


def most(patterns: Sequence[Axes], size: int) -> list[Case]:
    """The simplest pattern and the one that maps most, with one size."""
    return [Case((Level(size, pattern),)) for pattern in dict.fromkeys([patterns[0], patterns[-1]])]


def smaller(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one way each, the simplest first: to find the smallest that fails."""
    plain = tuple(
        Level(level.size, tuple(0 if a is not None else None for a in level.in_axes)) for level in case.levels
    )
    yield Case(plain)
    for size in range(1, max(case.sizes, default=0)):
        yield Case(tuple(replace(level, size=min(size, level.size)) for level in plain))
        yield replace(case, levels=tuple(replace(level, size=min(size, level.size)) for level in case.levels))


def axes_of(case: Case, leaf: int) -> list[Any]:
    """The axis of a leaf at each level that maps it."""
    return [case.levels[level].in_axes[leaf] for level in case.along(leaf)]
