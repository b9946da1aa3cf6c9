"""Reductions: an output that is combined over the mapped axis as the chunks come, instead of stacked.

Each is three functions over a state that is carried from chunk to chunk: `start` it, `add` a chunk to it (whose leaves
lead with the chunk's size), and `finish` it to the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from batchrules._bmap_axes import is_none
from batchrules._jax_versions import cast_varying, varying_axes

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

    def join(self, state: Sequence[Any], later: Sequence[Any]) -> list[Any]:
        """One state of two, of elements that follow each other."""
        ...

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        """The results, once all `size` elements were added."""
        ...


# --- sum and mean ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """The sum or the mean of one output, in single precision at least until the end, as in JAX."""

    indices: tuple[int, ...]
    mean: bool
    num_state = 1

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        total = self._total(stacked)
        return [lax.full_like(total, 0, dtype=_wider(total.dtype))]

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return [state[0] + jnp.sum(chunk[0].astype(state[0].dtype), axis=0)]

    def join(self, state: Sequence[Any], later: Sequence[Any]) -> list[Any]:
        return [state[0] + later[0]]

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        total = state[0] / size if self.mean else state[0]
        return [total.astype(self._total(stacked).dtype)]

    def _total(self, stacked: Sequence[Any]) -> Any:
        return jax.eval_shape(partial(jnp.mean if self.mean else jnp.sum, axis=0), stacked[0])


def _wider(dtype: Any) -> Any:
    is_half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_half else dtype


# --- max and min -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extremum:
    """The largest or smallest of one output.

    The state has a count of the elements that attain it, because equal ones share the derivative, as in
    `jax.numpy.max`.
    """

    indices: tuple[int, ...]
    largest: bool
    num_state = 2

    def start(self, stacked: Sequence[Any]) -> list[Any]:
        types = jax.eval_shape(self._of_chunk, stacked[0])
        return [lax.full_like(types[0], _worst(types[0].dtype, largest=self.largest)), lax.full_like(types[1], 0)]

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return self.join(state, self._of_chunk(chunk[0]))

    def join(self, state: Sequence[Any], later: Sequence[Any]) -> list[Any]:
        return list(_better(self.largest, *state, *later))

    def finish(self, state: Sequence[Any], stacked: Sequence[Any], size: int) -> list[Any]:
        del stacked
        if size == 0:
            raise ValueError(
                f'bmap: reduce="{"max" if self.largest else "min"}" of an axis of size 0 has no value; '
                "map over at least one element."
            )
        return [state[0]]

    def _of_chunk(self, chunk: Any) -> tuple[Any, Any]:
        best = (jnp.max if self.largest else jnp.min)(chunk, axis=0)
        count = jnp.sum(chunk == best[None], axis=0, dtype=_count_dtype(best.dtype))
        return best, lax.stop_gradient(count)


def _count_dtype(dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.dtype(jnp.float32)
    return _wider(jnp.finfo(dtype).dtype)


def _worst(dtype: Any, *, largest: bool) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf if largest else jnp.inf
    if dtype == jnp.bool_:
        return not largest
    return jnp.iinfo(dtype).min if largest else jnp.iinfo(dtype).max


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _better(largest: bool, old: Any, old_count: Any, new: Any, new_count: Any) -> tuple[Any, Any]:  # noqa: FBT001
    best = (jnp.maximum if largest else jnp.minimum)(old, new)
    zero = jnp.zeros_like(old_count)
    return best, jnp.where(old == best, old_count, zero) + jnp.where(new == best, new_count, zero)


@_better.defjvp
def _better_jvp(largest: bool, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:  # noqa: FBT001
    old, old_count, _, _ = primals
    best, count = _better(largest, *primals)
    weight = (jnp.where(old == best, old_count, jnp.zeros_like(old_count)) / count).astype(best.dtype)
    # JAX 0.7 gives zeros that do not vary where the others do.
    d_old, d_new = (cast_varying(t, varying_axes(jax.typeof(weight))) for t in (tangents[0], tangents[2]))
    moved = weight * d_old + (1 - weight) * d_new
    return (best, count), (moved, jnp.zeros_like(count))


# --- any other -------------------------------------------------------------------------------------------------------


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
        elements = [jax.eval_shape(lambda y: y[0], y) for y in stacked]
        init = [_as_init(x, y) for x, y in zip(self._leaves(self.init, "`init`"), elements, strict=True)]
        combined = jax.eval_shape(self._combine, init, elements)
        for i, (now, then) in enumerate(zip(init, combined, strict=True)):
            if (now.shape, now.dtype) != (then.shape, then.dtype):
                raise TypeError(
                    f"bmap: `combine` in reduce=(init, combine) must return what it is given; leaf {i} of `init` is "
                    f"{now.dtype}{list(now.shape)} and becomes {then.dtype}{list(then.shape)}. "
                    "Give `init` the shape and dtype of the function's result for one element."
                )
        return init

    def add(self, state: Sequence[Any], chunk: Sequence[Any]) -> list[Any]:
        return self.join(state, self._fold(list(chunk)))

    def join(self, state: Sequence[Any], later: Sequence[Any]) -> list[Any]:
        return self._combine(state, later)

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


def _as_init(init: Any, element: Any) -> Any:
    if isinstance(init, bool | int | float | complex):
        return jnp.full(element.shape, init, element.dtype)
    return jnp.asarray(init)


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
