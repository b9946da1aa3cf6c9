"""What surrounds a run: who calls, and how the places in its batch are told to the user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Surroundings:
    """What surrounds a run.

    Attributes:
        compiled: Whether a compiled program calls, of whose errors JAX keeps nothing but the text.
        shard: Whether the batch is what one device holds of a larger one.
        hidden: How many of the first axes are ours and not the user's.
    """

    compiled: bool = False
    shard: bool = False
    hidden: int = 0


EAGER = Surroundings()
