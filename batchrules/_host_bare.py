"""Foreign functions of the plainest kind as functions of arrays, one after another, that give one array.

A small function that is called often costs less than the flattening, filling and matching of trees around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from batchrules._host_body import HostBody, Primal
from batchrules._host_endpoints import GivenCotangent, GivenTangent
from batchrules._host_site import HostSite
from batchrules._sites import fill


class Bare(NamedTuple):
    """A function from arrays to one array.

    Attributes:
        function: The function, without any check.
        leaves_of: Makes the one leaf, or a clear error, of a value that is not the array that it should be.
    """

    function: Callable[..., Any]
    leaves_of: Callable[[Any], list[Any]]


def bare(site: HostSite) -> Bare | None:
    """The bare function of a site, if it is of the plainest kind and its first call has passed."""
    body = site.body
    if site.masks or len(site.results) != 1:
        return None
    if isinstance(body, Primal):
        function = body.first_call.unguarded()
        is_plain = function is not None and _is_plain(body, len(site.paths), 1)
        return Bare(function, body.leaves_of) if function is not None and is_plain else None
    if isinstance(body, GivenTangent) and _is_plain(body.of, len(body.nonzero), len(body.outputs)):
        return _bare_tangent(body)
    if isinstance(body, GivenCotangent) and _is_plain(body.of, len(body.wanted), len(body.seen)):
        return _bare_cotangent(body)
    return None


def _is_plain(body: HostBody, operands: int, outputs: int) -> bool:
    """Whether the user's function takes the leaves, one after another, and gives one array."""
    if not isinstance(body, Primal) or outputs != 1 or body.tree([0]) != 0:
        return False
    args, kwargs = body.structure.assemble(range(operands))
    return list(args) == list(range(operands)) and not kwargs


def _bare_tangent(body: GivenTangent) -> Bare | None:
    function = body.of.endpoints.jvp.first_call.unguarded()
    if function is None or body.of.passes_outputs:
        return None
    operands, nonzero, holes = len(body.nonzero), body.nonzero, [None] * len(body.nonzero)
    is_full = all(nonzero)

    def push(*leaves: Any) -> Any:
        tangents = leaves[operands:]
        return function(leaves[:operands], tangents if is_full else tuple(fill(nonzero, tangents, holes)))

    return Bare(push, body.taken)


def _bare_cotangent(body: GivenCotangent) -> Bare | None:
    function = body.of.endpoints.vjp.first_call.unguarded()
    if function is None or body.of.passes_outputs or not all(body.seen):
        return None
    operands, wanted, needed = len(body.wanted), body.wanted.index(True), body.needed

    def pull(*leaves: Any) -> Any:
        result = function(leaves[:operands], leaves[operands], needed)
        if type(result) is tuple and len(result) == operands and isinstance(result[wanted], np.ndarray):
            return result[wanted]
        return body.taken(result)[0]

    return Bare(pull, _one_leaf)


def _one_leaf(value: Any) -> list[Any]:
    return [value]
