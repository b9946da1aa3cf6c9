"""Host functions that take a batch without an error, and are wrong about it; and a count of calls."""

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import batchrules

VECTORISED = ("expand_dims", "broadcast_all", "legacy_vectorized")
F64 = jax.ShapeDtypeStruct((), "float64")
Array = np.ndarray[Any, Any]


def normalise(x: Any) -> Any:
    """The norm is that of the whole batch."""
    return x / np.sqrt((x * x).sum())


def largest(x: Any) -> Any:
    """The maximum is taken over the batch too."""
    return np.full(x.shape[:-1], x.max())


def centre(x: Any) -> Any:
    """The mean is that over the batch."""
    return x - x.mean(axis=0)


def cumulate(x: Any) -> Any:
    """The sum runs along the batch; the first element is right."""
    return np.cumsum(x) if x.ndim else x


def ignore(x: Any, w: Any) -> Any:
    """The batch dimension of w is ignored; the first element is right."""
    return x * (w[0] if w.ndim else w)


def misalign(x: Any, s: Any) -> Any:
    """NumPy lines s up with the last dimension of x, which happens to have its size."""
    return x * s


def repeat(x: Any) -> Any:
    """All results are those of the first element."""
    return np.broadcast_to(2 * x[:1], x.shape) if x.ndim else 2 * x


def reverse(x: Any) -> Any:
    """The results come in another order."""
    return x[::-1] if x.ndim else x


def random(*shape: int, seed: int = 0) -> Array:
    """Normal numbers, no two alike."""
    return np.random.default_rng(seed).normal(size=shape)


@dataclass(frozen=True)
class Lie:
    """A lie, and a batch that shows it.

    Args:
        function: The host function; right about one element.
        signature: What it pretends.
        args: A batch, each argument mapped along axis 0.
        vector: Whether an element of the result is like one of the first argument; else it is a number.
    """

    function: Callable[..., Any]
    signature: str
    args: tuple[Array, ...]
    vector: bool = False

    def call(self, method: str, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """The host call; `auto` is told the signature."""
        shape = jax.ShapeDtypeStruct(self.args[0].shape[1:], "float64") if self.vector else F64
        if method == "auto":
            options = {"signature": self.signature, **options}
        return batchrules.host_call(function or self.function, shape, method=method, name="simulate", **options)

    @property
    def lied(self) -> Array:
        """What it gives for the batch."""
        return np.asarray(self.function(*self.args))

    @property
    def right(self) -> Array:
        """What it gives element by element."""
        return by_element(self.function, *self.args)


def by_element(function: Callable[..., Any], *args: Any) -> Array:
    """The results of a loop, on 0-d arrays where an element is a number."""
    return np.stack([function(*(np.asarray(row) for row in rows)) for rows in zip(*args, strict=True)])


LIES = {
    "x / norm over the batch": Lie(normalise, "(n)->(n)", (random(4, 3),), vector=True),
    "maximum over the batch": Lie(largest, "(n)->()", (random(4, 3),)),
    "mean over the batch": Lie(centre, "(n)->(n)", (random(4, 3),), vector=True),
    "cumsum along the batch": Lie(cumulate, "()->()", (random(4),)),
    "a batch dimension ignored": Lie(ignore, "(),()->()", (random(4), random(4, seed=1))),
    "a misaligned scalar": Lie(misalign, "(n),()->(n)", (random(3, 3), random(3, seed=1)), vector=True),
    "the first result for all": Lie(repeat, "()->()", (random(4),)),
    "another order": Lie(reverse, "()->()", (random(4),)),
}


class Counted:
    """A host function that counts its calls by the shapes of their arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.shapes: collections.Counter[Any] = collections.Counter()
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        shapes = tuple(arg.shape for arg in args)
        self.shapes[shapes[0] if len(shapes) == 1 else shapes] += 1
        return self._function(*args)
