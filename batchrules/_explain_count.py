"""Numbers that are known, or bounded: calls, elements and bytes of a program that has not run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """A number from `low` to `high`; the two are equal where it is known.

    Attributes:
        low: The least that it can be.
        high: The most that it can be; None if nothing bounds it.
    """

    low: int
    high: int | None

    @property
    def exact(self) -> bool:
        """Whether the number is known."""
        return self.low == self.high

    def __add__(self, other: Count) -> Count:
        """The sum of two numbers."""
        high = None if self.high is None or other.high is None else self.high + other.high
        return Count(self.low + other.low, high)

    def times(self, other: Count) -> Count:
        """The product of two numbers."""
        if self.high == 0 or other.high == 0:
            return NONE
        high = None if self.high is None or other.high is None else self.high * other.high
        return Count(self.low * other.low, high)

    def either(self, other: Count) -> Count:
        """One of two numbers, and nobody knows which."""
        high = None if self.high is None or other.high is None else max(self.high, other.high)
        return Count(min(self.low, other.low), high)

    def at_most(self) -> Count:
        """Any number up to this one."""
        return Count(0, self.high)

    def __str__(self) -> str:
        """In words."""
        if self.exact:
            return str(self.low)
        if self.high is None:
            return f"at least {self.low}"
        return f"at most {self.high}" if self.low == 0 else f"{self.low} to {self.high}"


def counted(number: int | Count, what: str) -> str:
    """A number of things: `1 call`, `at most 3 calls`."""
    high = number.high if isinstance(number, Count) else number
    return f"{number} {what}" if high == 1 else f"{number} {what}s"


def exactly(number: int) -> Count:
    """A number that is known."""
    return Count(number, number)


NONE = exactly(0)
ONE = exactly(1)
UNKNOWN = Count(0, None)


@dataclass(frozen=True)
class Tally:
    """What calls amount to.

    Attributes:
        calls: How many calls there are.
        elements: How many elements they are given, taken together; a single call is given one. A bind of a registered
            primitive counts none: nobody knows what of its operands is a batch.
        bytes_in: The bytes of the arrays that they are given.
        bytes_out: The bytes of the arrays that they give back.
    """

    calls: Count = NONE
    elements: Count = NONE
    bytes_in: Count = NONE
    bytes_out: Count = NONE

    def __add__(self, other: Tally) -> Tally:
        """The sum of two."""
        return Tally(*(mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)))

    def times(self, count: Count) -> Tally:
        """So many times the same."""
        return Tally(*(mine.times(count) for mine in self.counts))

    def either(self, other: Tally) -> Tally:
        """One of two."""
        return Tally(*(mine.either(theirs) for mine, theirs in zip(self.counts, other.counts, strict=True)))

    def at_most(self) -> Tally:
        """Anything up to this."""
        return Tally(*(mine.at_most() for mine in self.counts))

    @property
    def counts(self) -> tuple[Count, Count, Count, Count]:
        """The four numbers."""
        return self.calls, self.elements, self.bytes_in, self.bytes_out
