"""The arguments that a check is made with: the example's arrays, and further elements made from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _trees

Array = np.ndarray[Any, Any]

# Multiples of it, without their whole parts, are all different and never close together.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class Leaf:
    """One array of the example, and the values that it has in other elements.

    Attributes:
        name: What messages call it: the parameter's name, and inside a container its keys and indices.
        value: The array; of random keys, their data.
        position: Its place among the leaves.
        seed: What the values in other elements follow from.
        key: The implementation of random keys, or None.
    """

    name: str
    value: Array
    position: int
    seed: int
    key: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in one element."""
        return self.value.shape[:-1] if self.key is not None else self.value.shape

    @property
    def inexact(self) -> bool:
        """Whether it may have derivatives."""
        return self.key is None and jnp.issubdtype(self.value.dtype, np.inexact)

    def variant(self, number: int) -> Array:
        """Its value in an element; number 0 is the example."""
        if number == 0:
            return self.value
        random = np.random.default_rng([self.seed, self.position, number])
        if self.key is not None:
            return _other_keys(self, number)
        if self.inexact:
            return self._moved(number)
        if self.value.dtype == np.bool_:
            return ~self.value if number % 2 else random.permutation(self.value.ravel()).reshape(self.value.shape)
        return _other_integers(self.value, number, random)

    def _moved(self, number: int) -> Array:
        """By up to a quarter of each number, so that signs stay; zeros become small positive numbers."""
        random = np.random.default_rng([self.seed, self.position])
        parts = 2 if self.value.dtype.kind == "c" else 1
        offsets = random.uniform(size=(parts, *self.value.shape))
        steps = (offsets + number * _GOLDEN) % 1
        steps = np.where(steps < 0.5, steps - 1, steps) / 4
        wide = self.value.astype(np.complex128 if parts == 2 else np.float64)
        step = steps[0] + 1j * steps[1] if parts == 2 else steps[0]
        return np.where(wide == 0, np.abs(steps[0]), wide * (1 + step)).astype(self.value.dtype)

    def array(self, values: Array) -> Any:
        """These values as JAX takes them."""
        return jnp.asarray(values) if self.key is None else wrapped(values, self.key)

    @property
    def described(self) -> str:
        """Its dtype and shape."""
        return f"{'key' if self.key is not None else self.value.dtype}{list(self.shape)}"


def wrapped(data: Array, key: Any) -> Any:
    """Random keys from their data."""
    return jax.random.wrap_key_data(jnp.asarray(data), impl=key)


def is_key(array: Any) -> bool:
    """Whether these are random keys."""
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _other_keys(leaf: Leaf, number: int) -> Array:
    width = leaf.value.shape[-1]
    flat = leaf.value.reshape(-1, width)
    rows = [jax.random.key_data(jax.random.fold_in(wrapped(row, leaf.key), number)) for row in flat]
    return np.asarray(rows).reshape(leaf.value.shape)


def _other_integers(value: Array, number: int, random: np.random.Generator) -> Array:
    """Within the range of the example; of a single number, from 1 (or -1) to that number."""
    if not value.size:
        return value
    low, high = int(value.min()), int(value.max())
    if low < high:
        return random.permutation(value.ravel()).reshape(value.shape)
    low, high = (min(1, low), high) if low > 0 else (low, max(-1, high) if high < 0 else high)
    spread = high - low + 1
    return np.full_like(value, low + (high - low + number) % spread)


@dataclass(frozen=True, eq=False)
class Example:
    """The arguments of one element, flat."""

    leaves: tuple[Leaf, ...]
    tree: Any

    def arguments(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with these arrays."""
        return jax.tree.unflatten(self.tree, arrays)


def example_of(fun: Callable[..., Any], args: tuple[Any, ...], seed: int, where: str) -> Example:
    """The example's arrays, with names."""
    arrays, tree = jax.tree.flatten(args)
    names = names_of(fun, args)
    if not arrays:
        raise ValueError(f"{where}: there is no array among the example's arguments, so nothing can be mapped.")
    leaves = [_leaf(name, array, i, seed, where) for i, (name, array) in enumerate(zip(names, arrays, strict=True))]
    return Example(tuple(leaves), tree)


def _leaf(name: str, array: Any, position: int, seed: int, where: str) -> Leaf:
    if is_key(array):
        return Leaf(name, np.array(jax.random.key_data(array)), position, seed, jax.random.key_impl(array))
    if not _trees.is_array(array):
        raise TypeError(
            f"{where}: the argument {name!r} is a {type(array).__name__}, and not an array. Arguments are the example "
            "of one element: arrays, and containers of them; fix what is no data with functools.partial."
        )
    # What JAX makes of it: 32 bits where 64-bit types are off.
    return Leaf(name, np.array(jnp.asarray(array)), position, seed)


def names_of(fun: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """The name of each leaf: that of the parameter, then keys and indices."""
    heads = _parameters(fun, len(args))
    names = []
    for head, arg in zip(heads, args, strict=True):
        for keys, _ in jax.tree_util.tree_flatten_with_path(arg)[0]:
            inside = jax.tree_util.keystr(keys, simple=True, separator=".")
            names.append(f"{head}.{inside}" if inside else head)
    return names


def _parameters(fun: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return [named[i] if i < len(named) else f"args.{i}" for i in range(count)]
