"""When two arrays count as the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _precision
from batchrules._testing_leaves import Array, is_key

# Sums in another order cost more than the last place, and less than this.
_RTOL = {64: 1e-9, 32: 1e-4, 16: 5e-2}
_COARSEST = 0.25
# Of what cancels, noise remains of the size of what it came from; in units of the last place.
_NOISE = 1e3


@dataclass(frozen=True)
class Tolerance:
    """How far two numbers may be apart: None for what fits their dtype."""

    rtol: float | None = None
    atol: float | None = None

    def close(self, got: Array, wanted: Array, noise: float = 0.0) -> Array:
        """For each number whether it is close enough; `noise` is the size of what may have cancelled."""
        if not jnp.issubdtype(wanted.dtype, np.inexact):
            return np.asarray(got == wanted)
        rtol = relative(wanted.dtype) if self.rtol is None else self.rtol
        floor = min(_NOISE * _precision.epsilon(wanted.dtype), 1e-2) * noise
        atol = rtol * largest([wanted]) + floor if self.atol is None else self.atol
        got, wanted = wide(got), wide(wanted)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.isclose(got, wanted, rtol, atol, equal_nan=True)


def relative(dtype: np.dtype[Any]) -> float:
    """The relative tolerance that fits a dtype."""
    return _RTOL.get(_precision.bits(dtype), _COARSEST)


def wide(array: Array) -> Array:
    """In numbers that NumPy can compute with, and twice as long."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def largest(arrays: Sequence[Array]) -> float:
    """The largest finite number, without its sign."""
    found = 0.0
    for array in arrays:
        if jnp.issubdtype(array.dtype, np.inexact):
            sizes = np.abs(wide(array))
            found = max(found, float(sizes.max(initial=0.0, where=np.isfinite(sizes))))
    return found


def as_numpy(array: Any) -> Array:
    """A result as NumPy has it; each random key as one value, its bytes."""
    if not is_key(array):
        return np.asarray(array)
    data = np.ascontiguousarray(jax.random.key_data(array))
    return data.view(np.dtype((np.void, data.itemsize * data.shape[-1])))[..., 0]


def difference(got: Array, wanted: Array) -> str:
    """How far apart two arrays are, in words."""
    if not jnp.issubdtype(wanted.dtype, np.inexact):
        return f"different in {int(np.sum(got != wanted))} of {wanted.size} places"
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(wide(got) - wide(wanted))
    finite = gaps[np.isfinite(gaps)]
    if finite.size < gaps.size and not np.array_equal(np.isfinite(wide(got)), np.isfinite(wide(wanted))):
        return "different in which numbers are finite"
    return f"apart by up to {float(finite.max(initial=0.0)):.3g}"


def ratio(got: Array, wanted: Array) -> float | None:
    """The one number that `wanted` is multiplied by in `got`; None if there is none, or it is 1."""
    if not jnp.issubdtype(wanted.dtype, np.inexact) or got.shape != wanted.shape:
        return None
    got, wanted = wide(got).ravel(), wide(wanted).ravel()
    square = float(np.sum(np.abs(wanted) ** 2))
    if not np.isfinite(square) or square == 0 or not np.isfinite(got).all():
        return None
    found = np.vdot(wanted, got) / square
    fits = np.allclose(got, found * wanted, rtol=1e-2, atol=1e-2 * abs(found) * float(np.abs(wanted).max()))
    if not fits or abs(found.imag) > 1e-2 or abs(found.real - 1) < 1e-2:
        return None
    return float(found.real)


def shown(array: Array) -> str:
    """An array in a line."""
    text = np.array2string(array, precision=6, threshold=12, edgeitems=3, separator=", ")
    return " ".join(text.split())
