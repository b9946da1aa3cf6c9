"""How fine the numbers of a dtype are, told without `finfo`.

`numpy.finfo` looks at subnormal numbers, and warns where they are flushed to zero, as they are in XLA's threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def epsilon(dtype: np.dtype[Any]) -> float:
    """The gap between 1 and the next number of an inexact dtype; of its real part if it is complex."""
    one = _real(dtype).type(1)
    return float(np.nextafter(one, _real(dtype).type(2))) - 1


@cache
def bits(dtype: np.dtype[Any]) -> int:
    """The width of a number of an inexact dtype in bits; of its real part if it is complex."""
    return 8 * _real(dtype).itemsize


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
