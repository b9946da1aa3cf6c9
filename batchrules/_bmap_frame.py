"""What a loop over chunks does with its arrays: its frame, apart from the program of one chunk.

That program, the *body*, takes something of each of the loop's operands and gives something of each result:

=========  ===================================================  ====================================
           of an operand                                        of a result
=========  ===================================================  ====================================
`Slot`     the chunk's part of an array                         the chunk's part of an array
carried    what the chunk before gave                           what the next chunk is given
neither    all of it
=========  ===================================================  ====================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple, TypeVar

from batchrules._bmap_collectives import ChunkedAxis
from batchrules._bmap_plan import Segment
from batchrules._jax_versions import with_axis, without_axis

T = TypeVar("T")


class Slot(NamedTuple):
    """Where a chunk's part of an array lies.

    Along `axis`, as many elements as the chunk has. Or, with a `segment`, the array has one part for each chunk of that
    segment, stacked along `axis`, and chunks of other segments have none.
    """

    axis: int
    segment: int | None = None


@dataclass(frozen=True)
class Frame:
    """A loop over chunks, but for the program of one chunk.

    Attributes:
        segments: The chunks, in order.
        inputs: For each operand its slot, or None.
        outputs: For each result its slot, or None for what is carried.
        carried: Pairs of an operand and a result, by number: what goes from chunk to chunk.
        in_place: Pairs of an operand and a result: the result is written over the operand, part by part.
        backward: Whether the last chunk is the first to be run.
        checkpoint: Whether derivatives in reverse mode compute each chunk again, and keep nothing of it.
        after: An operand. Arrays for results are allocated no sooner than it is known.
        in_blocks: Whether the axis before a slot's may be divided over devices.
        on_chunk: Called while tracing, with the number of a chunk's first element.
        chunked: The mapped axis, over which no derivative rule may have a collective.
    """

    segments: tuple[Segment, ...]
    inputs: tuple[Slot | None, ...]
    outputs: tuple[Slot | None, ...]
    carried: tuple[tuple[int, int], ...] = ()
    in_place: tuple[tuple[int, int], ...] = ()
    backward: bool = False
    checkpoint: bool = False
    after: int | None = None
    in_blocks: bool = False
    on_chunk: Callable[[Any], None] | None = None
    chunked: ChunkedAxis | None = None

    @property
    def length(self) -> int:
        """The number of elements."""
        return self.segments[-1].stop

    # What a segment's body takes and gives.

    def of_inputs(self, segment: int, each: Iterable[T]) -> list[T]:
        """Of something for each operand, what is for a segment's body."""
        return [x for x, slot in zip(each, self.inputs, strict=True) if _is_in(segment, slot)]

    def of_outputs(self, segment: int, each: Iterable[T]) -> list[T]:
        """Of something for each result, what is for a segment's body."""
        return [x for x, slot in zip(each, self.outputs, strict=True) if _is_in(segment, slot)]

    def numbers_in(self, segment: int) -> list[int]:
        """The numbers of the operands that a segment's body takes something of."""
        return self.of_inputs(segment, range(len(self.inputs)))

    def numbers_out(self, segment: int) -> list[int]:
        """The numbers of the results that a segment's body gives something of."""
        return self.of_outputs(segment, range(len(self.outputs)))

    def for_inputs(self, segment: int, own: Iterable[T], default: T) -> list[T]:
        """For each operand what there is for a segment's body; the default for operands that it does not have."""
        given = iter(own)
        return [next(given) if _is_in(segment, slot) else default for slot in self.inputs]

    def for_outputs(self, segment: int, own: Iterable[T], default: T) -> list[T]:
        """For each result what there is for a segment's body; the default for results that it does not have."""
        given = iter(own)
        return [next(given) if _is_in(segment, slot) else default for slot in self.outputs]

    # Types.

    def body_types(self, segment: int, types: Iterable[Any]) -> list[Any]:
        """The types of what a segment's body takes, where the operands have these."""
        pairs = zip(types, self.inputs, strict=True)
        return self.of_inputs(segment, [self._part(segment, kind, slot) for kind, slot in pairs])

    def result_types(self, bodies: Sequence[Any]) -> list[Any]:
        """The types of the results."""
        found: list[Any] = [None] * len(self.outputs)
        for segment, body in enumerate(bodies):
            own = self.for_outputs(segment, body.out_avals, None)
            found = [old if new is None else new for old, new in zip(found, own, strict=True)]
        return [self._whole(part, slot) for part, slot in zip(found, self.outputs, strict=True)]

    def _part(self, segment: int, whole: Any, slot: Slot | None) -> Any:
        if slot is None or not _is_in(segment, slot):
            return whole
        if slot.segment is not None:
            return without_axis(whole, slot.axis)
        return resized(whole, slot.axis, self.segments[segment].size)

    def _whole(self, part: Any, slot: Slot | None) -> Any:
        if slot is None:
            return part
        if slot.segment is not None:
            return with_axis(part, slot.axis, self.segments[slot.segment].count)
        return resized(part, slot.axis, self.length)

    # Other frames.

    def extended(self, operands: Sequence[int], results: Sequence[int]) -> Frame:
        """The frame of a loop that has, behind its own, operands and results like these once more."""
        new_in = {i: len(self.inputs) + k for k, i in enumerate(operands)}
        new_out = {j: len(self.outputs) + k for k, j in enumerate(results)}
        return replace(
            self,
            inputs=(*self.inputs, *(self.inputs[i] for i in operands)),
            outputs=(*self.outputs, *(self.outputs[j] for j in results)),
            carried=(*self.carried, *_renumbered(self.carried, new_in, new_out)),
        )

    def behind(self, slots: Sequence[Slot | None]) -> Frame:
        """The frame of a loop that has operands with these slots before its own."""
        count = len(slots)
        return replace(
            self,
            inputs=(*slots, *self.inputs),
            carried=tuple((i + count, j) for i, j in self.carried),
            in_place=tuple((i + count, j) for i, j in self.in_place),
            after=None if self.after is None else self.after + count,
        )

    def restricted(self, operands: Sequence[bool], results: Sequence[bool]) -> Frame:
        """The frame of a loop that has only the operands and results that are marked."""
        new_in = {i: k for k, i in enumerate(marked(operands))}
        new_out = {j: k for k, j in enumerate(marked(results))}
        return replace(
            self,
            inputs=tuple(compress(self.inputs, operands)),
            outputs=tuple(compress(self.outputs, results)),
            carried=_renumbered(self.carried, new_in, new_out),
            in_place=_renumbered(self.in_place, new_in, new_out),
            after=None if self.after is None else new_in.get(self.after),
        )

    def with_carried(
        self, operands: Sequence[bool], find: Callable[[int, list[bool]], list[bool]]
    ) -> tuple[list[bool], list[bool]]:
        """Operands and results that are marked; what is carried is marked before a chunk if and only if it is after it.

        `find` tells which results a segment marks, for the operands that are marked so far. It is costly: it is not
        asked about the other segments once one has marked more of what is carried.
        """
        now, after = list(operands), [False] * len(self.outputs)
        segment = 0
        while segment < len(self.segments):
            after = either(after, find(segment, now))
            more = [i for i, j in self.carried if after[j] and not now[i]]
            for i in more:
                now[i] = True
            segment = 0 if more else segment + 1
        return now, either(after, self.carried_from(now))

    def carried_from(self, operands: Sequence[bool]) -> list[bool]:
        """The results that are carried on from operands that are marked."""
        found = {j for i, j in self.carried if operands[i]}
        return [j in found for j in range(len(self.outputs))]


def _is_in(segment: int, slot: Slot | None) -> bool:
    return slot is None or slot.segment in (None, segment)


def _renumbered(
    pairs: Iterable[tuple[int, int]], new_in: dict[int, int], new_out: dict[int, int]
) -> tuple[tuple[int, int], ...]:
    return tuple((new_in[i], new_out[j]) for i, j in pairs if i in new_in and j in new_out)


def marked(marks: Iterable[bool]) -> list[int]:
    """The numbers of what is marked."""
    return [i for i, mark in enumerate(marks) if mark]


def either(*marks: Iterable[bool]) -> list[bool]:
    """What is marked in any of several lists."""
    return [any(each) for each in zip(*marks, strict=True)]


def resized(aval: Any, axis: int, size: int) -> Any:
    """The type of an array with this many elements along the axis."""
    return aval.update(shape=(*aval.shape[:axis], size, *aval.shape[axis + 1 :]))


Typed = tuple[int, Any, Slot | None]


def pairs_in_place(operands: Iterable[Typed], results: Iterable[Typed]) -> tuple[tuple[int, int], ...]:
    """Pairs of an operand and a result whose types and slots are the same. Each comes as its number, type and slot."""
    free = [x for x in operands if x[2] is not None and x[2].segment is None]
    pairs: list[tuple[int, int]] = []
    for j, kind, slot in results:
        match = next((x for x in free if x[1:] == (kind, slot)), None)
        if match is not None:
            free.remove(match)
            pairs.append((match[0], j))
    return tuple(pairs)
