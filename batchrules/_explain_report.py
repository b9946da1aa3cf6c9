"""What `explain` found: call sites, and the report that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from batchrules import _explain_text
from batchrules._explain_count import Count, Tally


@dataclass(frozen=True)
class MappedAxis:
    """One axis that a call is mapped over.

    Attributes:
        size: Its size; in `jax.shard_map` and on an Explicit mesh axis, that of one device's part.
        arguments: The arguments that are mapped along it.
    """

    size: int
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CallSite:
    """A place in a program that calls foreign code.

    Attributes:
        name: The name of the function or primitive.
        endpoint: `"call"` for the function itself, or the derivative: `"jvp"`, `"vjp"`, `"jacobian"`; `"vjp.jvp"` is
            the `jvp` of the `vjp` endpoint. Finite differences call the function itself.
        kind: `"host_call"`, `"device_call"` or `"registered"`.
        source: The user's line that the call comes from, `"file:line (function)"`; None if JAX does not know.
        axes: The axes that it is mapped over, the outermost first.
        method: What a call is given: the name of a method.
        reason: Why that method, in words.
        calls: How many calls the program makes here.
        elements: How many elements they are given; None for a registered primitive, whose operands do not say.
        first: How many elements the first call is given, or None.
        last: How many the last call is given, or None: fewer where a `batch_size` leaves a rest.
        bytes_in: The bytes of the arrays that the calls are given. A broadcast view counts with its full shape.
        bytes_out: The bytes of the arrays that they give back.
        dispatch: How the calls are issued, in words.
        places: What the call is inside of, the outermost first: loops, branches, devices.
        notes: What else there is to know.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> sine = batchrules.host_call(np.sin, lambda x: x, method="expand_dims", name="sine")
        >>> site = batchrules.explain(jax.vmap(sine), jnp.ones((4, 3))).sites[0]
        >>> print(site.name, site.endpoint, site.kind, site.axes[0].size, site.calls)
        sine call host_call 4 1
    """

    name: str
    endpoint: str
    kind: str
    source: str | None
    axes: tuple[MappedAxis, ...]
    method: str
    reason: str
    calls: Count
    elements: Count | None
    first: int | None
    last: int | None
    bytes_in: Count
    bytes_out: Count
    dispatch: str
    places: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain values, ready for JSON.

        Returns:
            A dict. A number in it is an int, or a dict with `low` and `high` where it is bounded.
        """
        return {
            **{name: getattr(self, name) for name in ("name", "endpoint", "kind", "source", "method", "reason")},
            "axes": [{"size": axis.size, "arguments": list(axis.arguments)} for axis in self.axes],
            **{name: _plain(getattr(self, name)) for name in ("calls", "elements", "bytes_in", "bytes_out")},
            **{name: getattr(self, name) for name in ("first", "last", "dispatch")},
            "places": list(self.places),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Report:
    """What a program does to foreign code; made by `explain`. It prints as a table of at most 100 columns.

    Attributes:
        sites: The call sites, in the order of the program.
        total: All of them taken together: `.calls`, `.elements`, `.bytes_in` and `.bytes_out`, each with `.low`,
            `.high` and `.exact`. Of the branches of a `cond` only one is counted.
        notes: What concerns the program as a whole.
        hints: What might make it cheaper.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> sine = batchrules.host_call(np.sin, lambda x: x, method="expand_dims", name="sine")
        >>> report = batchrules.explain(jax.vmap(sine), jnp.ones((4, 3)))
        >>> report.total.calls.high, report.total.bytes_in.high
        (1, 48)
    """

    sites: tuple[CallSite, ...] = ()
    total: Tally = field(default_factory=Tally)
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain values, ready for JSON.

        Returns:
            A dict with `sites`, `total`, `notes` and `hints`.
        """
        names = ("calls", "elements", "bytes_in", "bytes_out")
        return {
            "sites": [site.to_dict() for site in self.sites],
            "total": {name: _plain(getattr(self.total, name)) for name in names},
            "notes": list(self.notes),
            "hints": list(self.hints),
        }

    def __str__(self) -> str:
        """The table, and what each site does and why."""
        return _explain_text.as_text(self.sites, self.total, self._remarks)

    def __repr__(self) -> str:
        """The same: a report is there to be read."""
        return str(self)

    def _repr_html_(self) -> str:
        return _explain_text.as_html(self.sites, self.total, self._remarks)

    @property
    def _remarks(self) -> Sequence[tuple[str, str]]:
        return [*(("note", note) for note in self.notes), *(("hint", hint) for hint in self.hints)]


def _plain(count: Count | None) -> int | dict[str, int | None] | None:
    if count is None:
        return None
    return count.low if count.exact else {"low": count.low, "high": count.high}
