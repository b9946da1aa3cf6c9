"""How the mapped axis is cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchrules._jax_versions import canonical_dtype


@dataclass(frozen=True)
class Segment:
    """Equal chunks, one after the other: `count` of `size` elements each, from `start` on."""

    start: int
    size: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.count

    @property
    def index_type(self) -> np.dtype:
        """A dtype that holds the number of each element, with 64-bit types on or off. ValueError if there is none."""
        if self.stop < 2**31:
            return np.dtype(np.int32)
        if canonical_dtype(np.int64) == np.int64:
            return np.dtype(np.int64)
        if self.stop < 2**32:
            return np.dtype(np.uint32)
        raise ValueError(
            f"bmap: an axis of {self.stop} elements needs 64-bit indices. "
            'Turn them on: jax.config.update("jax_enable_x64", True).'
        )


@dataclass(frozen=True)
class ChunkPlan:
    """How an axis is cut: `first` elements at its start (perhaps none), then `count` chunks of `size`."""

    first: int
    size: int
    count: int

    @property
    def num_chunks(self) -> int:
        return self.count + (self.first > 0)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The smaller chunk, if there is one, and the others."""
        both = Segment(0, self.first, 1), Segment(self.first, self.size, self.count)
        return tuple(segment for segment in both if segment.size and segment.count)


def plan_one_chunk(axis_size: int) -> ChunkPlan:
    """All elements at once."""
    return ChunkPlan(axis_size, 0, 0)


def plan_chunks(axis_size: int, batch_size: int) -> ChunkPlan:
    """Equal chunks where few enough of them make up the axis, else full chunks after a smaller one.

    A smaller chunk is compiled on its own, and equal chunks are not, so a few chunks more are worth having.
    """
    fewest = -(-axis_size // batch_size)
    # Few chunks are found by their number, many by their size.
    if fewest < batch_size:
        counts = (count for count in range(fewest, 2 * fewest + 1) if axis_size % count == 0)
    else:
        counts = (axis_size // size for size in range(batch_size, 0, -1) if axis_size % size == 0)
    count = next(counts, axis_size)
    if count <= 2 * fewest:
        return ChunkPlan(0, axis_size // count, count)
    return ChunkPlan(axis_size % batch_size, batch_size, axis_size // batch_size)
