"""A foreign call as it was found in a program: what its site does, and how often the program comes by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchrules._explain_count import Count, Tally, counted
from batchrules._explain_report import CallSite, MappedAxis


@dataclass(frozen=True)
class Surrounds:
    """What is around a call.

    Attributes:
        manual: The mesh axes of the `shard_map`s around it.
    """

    manual: frozenset[object] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A foreign call in a program.

    Attributes:
        name: The name of the function or primitive.
        endpoint: What of it is called.
        kind: What it is.
        source: The user's line.
        axes: The mapped axes.
        method: The method.
        reason: Why.
        first: How many elements the first call is given, or None.
        last: How many the last one is given, or None.
        tally: What the calls amount to.
        has_elements: Whether the elements are known.
        dispatch: How calls are issued.
        places: What it is inside of, the outermost first.
        notes: What else there is to know.
        hints: What would make it cheaper.
        mappable: Whether a vmap in place of a loop would make its calls fewer.
        serial: How deep the innermost loop is whose earlier passes it depends on.
    """

    name: str
    endpoint: str
    kind: str
    source: str | None
    axes: tuple[MappedAxis, ...]
    method: str
    reason: str
    first: int | None
    last: int | None
    tally: Tally
    dispatch: str
    has_elements: bool = True
    places: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    mappable: bool = False
    serial: int = 0

    def repeated(self, count: Count, place: str, depth: int, passes: int | None) -> Found:
        """The same, so many times.

        Args:
            count: How many times.
            place: What it is inside of.
            depth: For a loop, how deep it is.
            passes: For a loop that a vmap could replace, how many passes it has.
        """
        if count.high is None:
            place = f"{place}, with {counted(self.tally.calls, 'call')} each time"
        hints = self.hints
        if passes is not None and passes > 1 and self.mappable and self.serial < depth:
            hint = (
                f"it takes a batch, and no pass of the scan of {passes} needs what an earlier one computed: jax.vmap "
                f"in place of the loop would make {passes} calls into one"
            )
            hints = (*hints, hint)
        return replace(self, tally=self.tally.times(count), places=(place, *self.places), hints=hints)

    def site(self) -> CallSite:
        """What the user is shown."""
        tally = self.tally
        return CallSite(
            name=self.name, endpoint=self.endpoint, kind=self.kind, source=self.source, axes=self.axes,
            method=self.method, reason=self.reason, calls=tally.calls,
            elements=tally.elements if self.has_elements else None, first=self.first, last=self.last,
            bytes_in=tally.bytes_in, bytes_out=tally.bytes_out, dispatch=self.dispatch, places=self.places,
            notes=self.notes,
        )  # fmt: skip
