"""The arguments of a mapped function: which of their leaves are mapped, along which axis, and how long it is."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from batchrules._jax_versions import is_reference


def is_none(x: Any) -> bool:
    """Whether this is None, which is a leaf among axes and no leaf elsewhere."""
    return x is None


def spread(prefix: Any, tree: Any, is_leaf: Any = is_none) -> list[Any]:
    """One entry of the prefix for each leaf of the tree. ValueError where the prefix does not fit."""
    spreads: list[Any] = []

    def over(entry: Any, subtree: Any) -> None:
        spreads.extend([entry] * len(jax.tree.leaves(subtree)))

    jax.tree.map(over, prefix, tree, is_leaf=is_leaf)
    return spreads


@dataclass(frozen=True)
class Arguments:
    """One call's arguments, flat: the mapped leaves apart from the others, which the function sees as they are."""

    leaves: tuple[Any, ...]
    axes: tuple[int | None, ...]
    treedef: Any

    @property
    def mapped(self) -> list[Any]:
        return [x for x, axis in zip(self.leaves, self.axes, strict=True) if axis is not None]

    @property
    def mapped_axes(self) -> list[int]:
        return [axis for axis in self.axes if axis is not None]

    @property
    def mapped_pairs(self) -> list[tuple[Any, int]]:
        return list(zip(self.mapped, self.mapped_axes, strict=True))

    @property
    def unmapped(self) -> list[Any]:
        return [x for x, axis in zip(self.leaves, self.axes, strict=True) if axis is None]

    def call(self, fun: Any, mapped: Sequence[Any]) -> Any:
        """The function, called with these values for the mapped leaves."""
        args, kwargs = jax.tree.unflatten(self.treedef, self.replace(mapped, self.unmapped).leaves)
        return fun(*args, **kwargs)

    def replace(self, mapped: Sequence[Any], unmapped: Sequence[Any]) -> Arguments:
        """The same arguments with other values for their leaves."""
        values, others = iter(mapped), iter(unmapped)
        leaves = tuple(next(others if axis is None else values) for axis in self.axes)
        return Arguments(leaves, self.axes, self.treedef)

    def size(self, axis_size: int | None) -> int | None:
        """The mapped axis's length, or None where `jax.vmap` would find fault with it."""
        lengths = {x.shape[axis] for x, axis in zip(self.mapped, self.mapped_axes, strict=True)}
        if axis_size is not None:
            if not isinstance(axis_size, numbers.Real):
                return None
            lengths.add(axis_size)
        return lengths.pop() if len(lengths) == 1 else None


def flatten_arguments(in_axes: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments | None:
    """The arguments, or None where `jax.vmap` would find fault with them or their axes."""
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
    try:
        axes = spread((tuple(in_axes) if isinstance(in_axes, list) else in_axes, 0), (tuple(args), dict(kwargs)))
    except ValueError:
        return None
    positive = [_positive(x, axis) for x, axis in zip(leaves, axes, strict=True)]
    if any(axis is False for axis in positive):
        return None
    return Arguments(
        tuple(_as_array(x, axis) for x, axis in zip(leaves, positive, strict=True)), tuple(positive), treedef
    )


def _as_array(x: Any, axis: int | None) -> Any:
    return x if axis is None or isinstance(x, jax.Array) else jax.numpy.asarray(x)


def _positive(x: Any, axis: Any) -> Any:
    """The axis counted from the front; False where `x` has no such axis."""
    if axis is None:
        return None
    if not isinstance(axis, int) or not isinstance(x, jax.Array | np.ndarray | np.generic):
        return False
    if isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "OSUMm":
        return False
    return axis % x.ndim if -x.ndim <= axis < x.ndim else False


def refuse_references(tree: Any) -> None:
    """TypeError for a `jax.Ref`. `jax.vmap` maps one in place, which chunks can't."""
    for path, x in jax.tree.leaves_with_path(tree):
        if is_reference(x):
            raise TypeError(
                f"bmap: argument{jax.tree_util.keystr(path[1:])} is a reference, {jax.typeof(x)}, which can't be "
                "mapped in chunks. Pass its value (ref[...]), or use jax.vmap."
            )
