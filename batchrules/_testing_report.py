"""What a check found: a report of what agrees, or an error that lists what does not."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Disagreement:
    """One thing that is wrong, with the smallest case that shows it.

    Attributes:
        cause: What is probably wrong, in words.
        program: The case: the JAX program and what it was given.
        evidence: What came and what was wanted; or the error.
        transformations: How many cases failed in this way, by transformation.

    Example:
        >>> from batchrules.testing import Disagreement
        >>> print(Disagreement("s lines up with the wrong axis", "vmap of scale", "came 1, wanted 2", {"vmap": 3}))
        s lines up with the wrong axis
             vmap of scale
             came 1, wanted 2
             Cases that fail so: vmap (3)
    """

    cause: str
    program: str
    evidence: str
    transformations: Mapping[str, int]

    def __str__(self) -> str:
        """A paragraph."""
        kinds = ", ".join(f"{name} ({count})" for name, count in self.transformations.items())
        lines = [self.cause, *self.program.splitlines(), *self.evidence.splitlines(), f"Cases that fail so: {kinds}"]
        return "\n     ".join(lines)


@dataclass
class Report:
    """What a check did.

    Attributes:
        name: What was checked.
        counts: How many cases were tried, by transformation.
        left_out: What was not tried, and why.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from batchrules.testing import check_batching
        >>> report = check_batching(jnp.negative, np.float32(2.0), in_axes=(0,), endpoints=())
        >>> report.total > 0, report.left_out
        (True, [])
    """

    name: str
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    left_out: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many cases were tried."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """A table."""
        width = max(map(len, self.counts), default=0)
        lines = [f"{self.name}: {self.total} cases agree with one-element calls"]
        lines += [f"  {name:<{width}}  {count:>4}" for name, count in self.counts.items()]
        lines += [f"  not tried: {reason}" for reason in self.left_out]
        return "\n".join(lines)

    def leave_out(self, reason: str) -> None:
        """Note once what was not tried."""
        if reason not in self.left_out:
            self.left_out.append(reason)


class BatchDisagreement(AssertionError):  # noqa: N818  # it says what it is, as AssertionError does
    """A function and its batched or differentiated form disagree.

    The text lists each disagreement with the smallest case that shows it, and a likely cause.

    Attributes:
        disagreements: What is wrong.
        report: What was tried.

    Example:
        >>> import jax, numpy as np, batchrules
        >>> from batchrules.testing import BatchDisagreement, check_batching
        >>> @batchrules.host_call(result_shape=lambda x: x, method="expand_dims", verify=False)
        ... def unit(x):
        ...     return x / np.linalg.norm(x)  # of the whole batch
        >>> try:
        ...     check_batching(unit, np.array([3.0, 4.0], "float32"), in_axes=(0,), endpoints=())
        ... except BatchDisagreement as error:
        ...     print(error.disagreements[0].cause)
        the result of an element depends on the other elements of the batch (through x)
    """

    def __init__(self, disagreements: Sequence[Disagreement], report: Report) -> None:
        super().__init__(_text(disagreements, report))
        self.disagreements = tuple(disagreements)
        self.report = report


def _text(disagreements: Sequence[Disagreement], report: Report) -> str:
    failed = sum(sum(found.transformations.values()) for found in disagreements)
    number = f"{len(disagreements)} disagreement{'s' if len(disagreements) > 1 else ''}"
    lines = [f"{report.name}: {number}, {failed} of {report.total} cases failed"]
    lines += [f"{i:>3}. {found}" for i, found in enumerate(disagreements, 1)]
    lines += [f"not tried: {reason}" for reason in report.left_out]
    return "\n".join(lines)
