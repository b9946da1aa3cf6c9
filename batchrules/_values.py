"""A user's functions and static values: their names in messages, and how JAX's caches must compare them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


class Static:
    """A static argument. `1 == True == 1.0` and `0.0 == -0.0`, yet a function can tell them apart, and so does this."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _key(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.value)


def _key(value: Any) -> Any:
    if isinstance(value, np.generic):
        return type(value), value.dtype.str, value.tobytes()
    if isinstance(value, float):
        return type(value), value.hex()
    if isinstance(value, complex):
        return type(value), value.real.hex(), value.imag.hex()
    if isinstance(value, tuple):
        return type(value), tuple(_key(part) for part in value)
    if isinstance(value, frozenset):
        return type(value), frozenset(_key(part) for part in value)
    return type(value), value


@dataclass(frozen=True, eq=False)
class ByIdentity:
    """A callable without a hash, such as an instance of a plain dataclass, compared by identity."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.function(*args, **kwargs)


def hashable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in a form that JAX can put into a cache."""
    try:
        hash(function)
    except TypeError:
        return ByIdentity(function)
    return function


def label_of(function: Any, name: str | None, decorator: str) -> str:
    """What messages call a function; an error if it is none."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{decorator}: name must be a string or None; got {name!r}.")
    if callable(function):
        return f"{decorator} {(name or getattr(function, '__name__', type(function).__name__))!r}"
    options = "(result_shape=...)" if decorator == "host_call" else "(method=...)"
    raise TypeError(
        f"{decorator}: fn must be a function; got {function!r} of type {type(function).__name__}. As a decorator, "
        f"write @{decorator}{options}."
    )


def shortened(text: str, width: int) -> str:
    """A text of at most so many characters: its start and its end, which is where addresses and paths differ."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def name_in(label: str) -> str:
    """The name of a function, from what messages call it."""
    return ast.literal_eval(label.partition(" ")[2])


def number_as(value: complex, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A Python number as an array of a dtype; a ValueError says why it does not fit."""
    came = next(rank for rank, kind in enumerate((bool, int, float, complex)) if isinstance(value, kind))
    fits = next(
        rank
        for rank, kind in enumerate((np.bool_, np.integer, np.floating, np.complexfloating))
        if jnp.issubdtype(dtype, kind)
    )
    if came > fits:
        raise ValueError(f"a {type(value).__name__} does not fit")
    try:
        return np.asarray(value, dtype)
    except OverflowError:
        raise ValueError("it is out of range") from None
