"""Reductions: an output that is combined over the mapped axis as the chunks come, instead of stacked.

Each is four functions over a state that is carried from chunk to chunk: `start` it, `add` a chunk to it (whose leaves
lead with the chunk's size), `join_blocks` where devices have a state each, and `finish` it to the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from batchrules._bmap_axes import is_none
from batchrules._bmap_reduce_named import Extremum, Total
from batchrules._bmap_sharding import whole_along_first

NAMES = ("sum", "mean", "max", "min")


class Reduction(Protocol):
    """How some of the outputs (`indices` counts them) are reduced."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of the outputs."""
        ...

    @property
    def num_state(self) -> int:
        """How many arrays its state has."""
        ...

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        """The state before the first chunk, for outputs that would have these types when stacked along axis 0."""
        ...

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        """The state after one more chunk."""
        ...

    def join_blocks(self, states: Sequence[Any]) -> list[Any]:
        """One state of several, of blocks of elements that follow each other.

        The arrays have a state for each block along axis 0, which is spread over devices.
        """
        ...

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        """The results, once all `size` elements were added."""
        ...


# --- (init, combine) -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """A reduction of one subtree by the user's associative `combine`, whose neutral element is `init`."""

    indices: tuple[int, ...]
    init: Any
    combine: Callable[[Any, Any], Any]
    treedef: Any

    @property
    def num_state(self) -> int:
        return len(self.indices)

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        elements = [jax.ShapeDtypeStruct(y.shape[1:], y.dtype) for y in stacked]
        leaves = enumerate(zip(self._leaves(self.init, "`init`"), elements, strict=True))
        init = [_as_init(i, x, y) for i, (x, y) in leaves]
        combined = jax.eval_shape(self._combine, init, elements)
        for i, (now, then) in enumerate(zip(init, combined, strict=True)):
            if (now.shape, now.dtype) != (then.shape, then.dtype):
                raise TypeError(
                    f"bmap: `combine` in reduce=(init, combine) must return what it is given; leaf {i} of `init` is "
                    f"{now.dtype}{list(now.shape)} and becomes {then.dtype}{list(then.shape)}. "
                    "Let `combine` keep shapes and dtypes."
                )
        return init

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return self._combine(state, self._fold(list(chunk)))

    def join_blocks(self, states: Sequence[Any]) -> list[Any]:
        # Their order counts, so each device needs all of them.
        return self._fold([whole_along_first(x) for x in states])

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        del stacked, size
        return list(state)

    def _fold(self, chunk: list[Any]) -> list[Any]:
        """Combine neighbours, then neighbours among the results, and so on: their order is kept."""
        size = chunk[0].shape[0]
        while size > 1:
            even = size - size % 2
            pairs = jax.vmap(self._combine)([y[0:even:2] for y in chunk], [y[1:even:2] for y in chunk])
            chunk = [jnp.concatenate([p, y[even:]]) for p, y in zip(pairs, chunk, strict=True)] if size % 2 else pairs
            size = chunk[0].shape[0]
        return [y[0] for y in chunk]

    def _combine(self, a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
        trees = (jax.tree.unflatten(self.treedef, list(x)) for x in (a, b))
        return self._leaves(self.combine(*trees), "what `combine` returns")

    def _leaves(self, tree: Any, what: str) -> list[Any]:
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise TypeError(
                f"bmap: in reduce=(init, combine), {what} must have the structure of the output it reduces: "
                f"expected {self.treedef}, got {treedef}."
            )
        return leaves


def _as_init(i: int, init: Any, element: Any) -> Any:
    """A leaf of `init` as an array of the results' type. TypeError or ValueError where it is none."""
    wanted = f"{element.dtype}{list(element.shape)}, the shape and dtype of the function's result for one element"
    if isinstance(init, bool | int | float | complex):
        if not _has(element.dtype, init):
            raise ValueError(f"bmap: leaf {i} of `init` in reduce=(init, combine) must be {wanted}; got {init!r}.")
        return jnp.full(element.shape, init, element.dtype)
    if not isinstance(init, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"bmap: leaf {i} of `init` in reduce=(init, combine) must be a number or an array of {wanted}; "
            f"got {init!r}."
        )
    if (init.shape, init.dtype) != (element.shape, element.dtype):
        raise TypeError(
            f"bmap: leaf {i} of `init` in reduce=(init, combine) must be {wanted}; got {init.dtype}{list(init.shape)}."
        )
    return jnp.asarray(init)


def _has(dtype: Any, number: complex) -> bool:
    """Whether a dtype has such a number, rounded perhaps where it is inexact."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return True
    if isinstance(number, complex):
        return False
    if jnp.issubdtype(dtype, jnp.floating):
        return True
    if dtype == jnp.bool_:
        return number in (0, 1)
    if not jnp.issubdtype(dtype, jnp.integer) or not math.isfinite(number):
        return False
    bounds = jnp.iinfo(dtype)
    return number == int(number) and bounds.min <= number <= bounds.max


# --- reading the argument --------------------------------------------------------------------------------------------


def _is_fold(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1])


def _is_entry(entry: Any) -> bool:
    return is_none(entry) or isinstance(entry, str) or _is_fold(entry)


def check_reduce(reduce: Any) -> None:
    """TypeError or ValueError unless every leaf of `reduce` is one of the reductions."""
    for entry in jax.tree.leaves(reduce, is_leaf=_is_entry):
        if isinstance(entry, str) and entry not in NAMES:
            raise ValueError(
                f"bmap: reduce must be one of {', '.join(map(repr, NAMES))} or (init, combine); got {entry!r}."
            )
        if not _is_entry(entry):
            raise TypeError(
                f"bmap: reduce must be a name ({', '.join(map(repr, NAMES))}), a pair (init, combine) of a neutral "
                f"element and a function of two results, or a pytree prefix of these; got {entry!r}."
            )


def reductions_of(reduce: Any, treedef: Any) -> list[Reduction]:
    """The reductions that a prefix `reduce` of the function's output asks for."""
    numbered = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    found: list[Reduction] = []

    def visit(entry: Any, subtree: Any) -> None:
        indices, structure = jax.tree.flatten(subtree)
        if isinstance(entry, str):
            found.extend(_named(entry, (i,)) for i in indices)
        elif entry is not None and indices:
            found.append(Fold(tuple(indices), entry[0], entry[1], structure))

    try:
        jax.tree.map(visit, reduce, numbered, is_leaf=_is_entry)
    except ValueError as error:
        raise ValueError(
            f"bmap: reduce must be a pytree prefix of the function's output, whose structure is {treedef}; "
            f"got {reduce!r}."
        ) from error
    return found


def _named(name: str, indices: tuple[int, ...]) -> Reduction:
    if name in ("sum", "mean"):
        return Total(indices, mean=name == "mean")
    return Extremum(indices, largest=name == "max")
