"""Pytrees: flattening with optree, containers that only JAX knows, and the paths of leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optree

_JAX_LEAF = jax.tree_util.tree_structure(0)
# In the order of their price: that of jax.Array is a function in Python.
_ARRAY_LIKE = (np.ndarray, np.generic, bool, int, float, complex, jax.Array)


@dataclass(frozen=True)
class Structure:
    """The structure of a tree: optree's, with what JAX alone knows inside its leaves.

    Attributes:
        spec: The structure that optree sees.
        inside: For each leaf of `spec`, None for a true leaf, else the container that JAX knows. Empty where every
            leaf is a true one.
    """

    spec: optree.PyTreeSpec
    inside: tuple[Container | None, ...]

    @property
    def count(self) -> int:
        """The number of leaves."""
        if not self.inside:
            return self.spec.num_leaves
        return sum(1 if part is None else part.count for part in self.inside)

    def __str__(self) -> str:
        """The tree as optree writes it, a star for each leaf, then the JAX containers inside."""
        containers = [str(part.treedef) for part in self.inside if part is not None]
        text = str(self.spec).removeprefix("PyTreeSpec(").removesuffix(")")
        return f"{text} with {', '.join(containers)}" if containers else text


@dataclass(frozen=True)
class Container:
    """One container that JAX knows and optree does not, such as an Equinox module."""

    treedef: Any
    children: tuple[Structure, ...]

    @property
    def count(self) -> int:
        """The number of leaves inside."""
        return sum(child.count for child in self.children)


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree and its structure."""
    candidates, spec = optree.tree_flatten(tree)
    if all(is_array(candidate) for candidate in candidates):
        return candidates, Structure(spec, ())
    leaves: list[Any] = []
    inside = tuple(_flatten_inside(candidate, leaves) for candidate in candidates)
    return leaves, Structure(spec, inside if any(inside) else ())


def leaves_like(tree: Any, structure: Structure) -> list[Any] | None:
    """The leaves of a tree, if it has this structure and nothing in it is for JAX alone to flatten.

    Several times as fast as `flatten`, and without what makes that slow in threads: `optree.tree_flatten` lets go of
    the GIL for a moment, and gets it back some milliseconds later if another thread computes.
    """
    if structure.inside:
        return None
    try:
        leaves = structure.spec.flatten_up_to(tree)
    except ValueError:
        return None
    return leaves if all(is_array(leaf) for leaf in leaves) else None


def is_array(leaf: Any) -> bool:
    """Whether this is an array or a number."""
    return isinstance(leaf, _ARRAY_LIKE)


def _flatten_inside(candidate: Any, leaves: list[Any]) -> Container | None:
    if is_array(candidate) or not _is_jax_container(candidate):
        leaves.append(candidate)
        return None
    children, treedef = _one_level(candidate)
    structures = []
    for child in children:
        child_leaves, structure = flatten(child)
        leaves.extend(child_leaves)
        structures.append(structure)
    return Container(treedef, tuple(structures))


def _is_jax_container(candidate: Any) -> bool:
    return jax.tree_util.tree_structure(candidate, is_leaf=lambda node: node is not candidate) != _JAX_LEAF


def _one_level(container: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(container, is_leaf=lambda node: node is not container)


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Any:
    """The tree of that structure with these leaves."""
    if not structure.inside:
        return optree.tree_unflatten(structure.spec, leaves)
    source = iter(leaves)
    filled = [next(source) if part is None else _fill(part, source) for part in structure.inside]
    return optree.tree_unflatten(structure.spec, filled)


def _fill(container: Container, source: Iterator[Any]) -> Any:
    children = [unflatten(child, [next(source) for _ in range(child.count)]) for child in container.children]
    return jax.tree_util.tree_unflatten(container.treedef, children)


def paths(tree: Any) -> list[str]:
    """The path of each leaf: keys and indices joined by dots; the empty string for a tree that is a leaf."""
    return [".".join(parts) for parts in _walk(tree)]


def _walk(tree: Any) -> Iterator[tuple[str, ...]]:
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    for accessor, leaf in zip(accessors, leaves, strict=True):
        prefix = tuple(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        if is_array(leaf) or not _is_jax_container(leaf):
            yield prefix
            continue
        children, _ = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda node, top=leaf: node is not top)
        for keys, child in children:
            step = jax.tree_util.keystr(keys, simple=True, separator=".")
            for rest in _walk(child):
                yield (*prefix, step, *rest)


def matched(tree: Any, like: Any, *, branches: bool = False) -> list[Any]:
    """For each leaf of `like`, what stands in its place in `tree`; None in `tree` stands for a whole branch.

    With `branches`, a container may stand in the place of a leaf. Nobody asks what stands where `like` has None.

    Raises:
        ValueError: A branch of `tree` has other children than that of `like`.
    """
    if like is None:
        return []
    if tree is None:
        return [None] * len(flatten(like)[0])
    expected, got = _children(like), _children(tree)
    if expected is None and (got is None or branches):
        return [tree]
    if expected is None:
        raise ValueError(f"expected an array; got a {type(tree).__name__}")
    if got is None or len(got) != len(expected):
        found = f"a {type(tree).__name__}" if got is None else f"{len(got)} children"
        raise ValueError(f"expected {len(expected)} children, as in {flatten(like)[1]}; got {found}")
    if _keys(tree) != _keys(like):
        raise ValueError(f"expected the keys {list(like)}; got {list(tree)}")
    if isinstance(like, dict):
        # Kinds of dict differ in the order of their children.
        node: Any = like
        got = [tree[key] for key in optree.tree_flatten_one_level(node)[2]]
    pairs = zip(got, expected, strict=True)
    return [leaf for child, like_child in pairs for leaf in matched(child, like_child, branches=branches)]


def _keys(node: Any) -> set[Any] | None:
    return set(node) if isinstance(node, dict) else None


def _children(node: Any) -> list[Any] | None:
    """The children of a container, None for a leaf; None itself is a container without children."""
    if node is None:
        return []
    if optree.tree_is_leaf(node):
        return _one_level(node)[0] if not is_array(node) and _is_jax_container(node) else None
    return list(optree.tree_flatten_one_level(node)[0])


def check_arguments(leaves: Sequence[Any], leaf_paths: Sequence[str], where: str) -> None:
    """Raise for an argument that is not an array, saying at which path it stands and what can be done."""
    for leaf, path in zip(leaves, leaf_paths, strict=True):
        if is_array(leaf):
            _check_dtype(leaf, path, where)
            continue
        raise TypeError(
            f"{where}: the argument {path!r} is a {type(leaf).__name__}, which is neither an array, nor a number, nor "
            "a container that optree or JAX knows. Register its type with jax.tree_util.register_dataclass or "
            "jax.tree_util.register_pytree_node, or name the argument in static_argnames if it is not data."
        )


def jax_can_hold(dtype: np.dtype[Any]) -> bool:
    """Whether there are JAX arrays of this dtype, which may be one of ml_dtypes."""
    return dtype.isnative and dtype.kind not in "OSUMm" and dtype.type not in (np.longdouble, np.clongdouble, np.void)


def _check_dtype(leaf: Any, path: str, where: str) -> None:
    dtype = getattr(leaf, "dtype", None)
    if isinstance(dtype, np.dtype) and not jax_can_hold(dtype):
        raise TypeError(
            f"{where}: the argument {path!r} is an array of dtype {dtype}, which JAX cannot hold. Convert it to a "
            "numeric or boolean dtype, or name the argument in static_argnames if it is not data."
        )
