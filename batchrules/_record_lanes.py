"""Lanes for drawing recorded calls: one for each worker, and more where its calls overlap."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from batchrules._events import RecordedCall


class _Lane:
    """Calls that lie side by side or within each other: a host function may call another one."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self._open: list[float] = []  # when those end that the next call may lie within, the innermost last

    def takes(self, call: RecordedCall) -> bool:
        """Take the call if it fits; calls come in the order in which they start."""
        end = call.start + call.duration
        while self._open and self._open[-1] <= call.start:
            self._open.pop()
        if self._open and end > self._open[-1]:
            return False
        self._open.append(end)
        self.calls.append(call)
        return True


def lanes(calls: Iterable[RecordedCall]) -> dict[str, Sequence[RecordedCall]]:
    """The calls of each lane by its name, in the order in which they started.

    A worker has one lane; a second one if two batches had threads of the same name at the same time.
    """
    found: dict[str, _Lane] = {}
    # Of calls that start together, the outer one first.
    for call in sorted(calls, key=lambda call: (call.start, -call.duration)):
        names = itertools.chain([call.worker], (f"{call.worker} ({number})" for number in itertools.count(2)))
        next(name for name in names if found.setdefault(name, _Lane()).takes(call))
    return {name: lane.calls for name, lane in found.items()}
