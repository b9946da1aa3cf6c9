"""Collectives over the mapped axis, which would answer for one chunk only: an error, wherever they are met."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkedAxis:
    """The name of a mapped axis that is cut into chunks, its size, and the largest chunk's."""

    name: Hashable
    size: int
    batch_size: int

    def refuse(self, names: set[Hashable]) -> None:
        """ValueError if a function that takes these axis names takes this one."""
        if self.name in names:
            raise self.error()

    def error(self) -> ValueError:
        """What to say of a function with a collective over this axis."""
        return ValueError(
            f"bmap: the function uses a collective over the axis {self.name!r}, which needs all {self.size} elements "
            f"at once, and a chunk has {self.batch_size}. Use batch_size=None (or jax.vmap), or move the collective "
            "out of the function: reduce= computes sums, means, maxima and minima over all chunks."
        )


@contextmanager
def no_collectives(axis: ChunkedAxis | None) -> Iterator[None]:
    """Say the same of the user's derivative rules, which are not run before a derivative is taken."""
    try:
        yield
    except NameError as error:
        if axis is None or not re.search(rf"unbound axis name: {re.escape(str(axis.name))}(?!\w)", str(error)):
            raise
        raise axis.error() from error
