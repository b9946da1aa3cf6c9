"""Which site serves which transformation.

A call's derivative is its tangent site, and the transpose of that is its cotangent site.

One call site for each: `tangent_site` is linear in its tangents, `cotangent_site` in its cotangents, and each is the
transpose of the other. In what they are linear, they are their own derivative.

Two rules keep vectorised derivatives right: a tangent and its primal lead alike, and a primal whose cotangent is
wanted leads with the size of the batch, never with 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from batchrules._batch import Axes, BatchAxis, OutAxis
from batchrules._recording import Result
from batchrules._sites import Mask, Origin, Site, fill, select

S = TypeVar("S", bound=Site)


def inexact_outputs(site: Site) -> Mask:
    """For each output, whether it can have a tangent."""
    return tuple(result.differentiable and bool(jnp.issubdtype(result.dtype, np.inexact)) for result in site.results)


def tangent_site(site: S, nonzero: Mask, outputs: Mask) -> S:
    """The site of the tangents of these outputs.

    Its operands are the primals, the outputs if it is given them, and the nonzero tangents.
    """
    moving = [i for i, has_tangent in enumerate(nonzero) if has_tangent]
    first = len(nonzero) + site.passed
    request = replace(
        site.request,
        # Positions in a request do not count the mask of `where`, which no call is given.
        tied=(*site.request.tied, *((primal - site.masks, first - site.masks + k) for k, primal in enumerate(moving))),
        followers=site.request.followers + site.passed + len(moving),
    )
    return replace(
        site,
        body=site.tangent_body(nonzero[site.masks :], outputs),
        name=f"{site.name} (jvp)",
        paths=(*site.paths, *_passed_paths(site), *(f"tangent of {site.paths[i]}" for i in moving)),
        results=tuple(_derived(result, "tangent") for result in select(site.results, outputs)),
        request=request,
        linear=len(moving),
        origin=Origin(site, nonzero, outputs, cotangent=False),
    )


def cotangent_site(site: S, wanted: Mask, seen: Mask, results: Sequence[Result]) -> S:
    """The site of the cotangents of the wanted primals.

    Its operands are the primals, the outputs if it is given them, and the seen cotangents. `results` are the wanted
    primals as one element sees them.
    """
    outputs = [i for i, is_seen in enumerate(seen) if is_seen]
    first = len(wanted) + site.passed
    batched = {i for i in range(len(wanted)) if wanted[i]} | set(range(first, first + len(outputs)))
    request = replace(
        site.request,
        batched=site.request.batched | {i - site.masks for i in batched},
        followers=site.request.followers + site.passed + len(outputs),
    )
    return replace(
        site,
        body=site.cotangent_body(wanted[site.masks :], seen),
        name=f"{site.name} (vjp)",
        paths=(
            *site.paths,
            *_passed_paths(site),
            *(f"cotangent of output {site.results[i].path or i}" for i in outputs),
        ),
        results=tuple(results),
        request=request,
        linear=len(outputs),
        origin=Origin(site, wanted, seen, cotangent=True),
    )


def _derived(result: Result, kind: str) -> Result:
    return Result(f"{kind} of {result.path}" if result.path else kind, result.shape, result.dtype)


def _passed_paths(site: Site) -> list[str]:
    return [f"output {result.path or i}" for i, result in enumerate(site.results)][: site.passed]


def transposed_site(site: S, wanted: Mask, seen: Mask, operands: Sequence[Result]) -> S:
    """The transpose of a derived site in what it is linear in.

    Args:
        site: A tangent or cotangent site.
        wanted: For each of its linear operands, whether its cotangent is asked for.
        seen: For each of its outputs, whether it has a cotangent.
        operands: The operands of its base, as one element sees them.

    Returns:
        A site whose operands are the fixed ones, then the seen cotangents. A cotangent site gives the wanted ones; a
        tangent site gives one output for each differentiable output of its base.
    """
    origin = site.origin
    if origin is None:
        raise TypeError(f"{site.name} is not linear in its operands, so it has no transpose.")
    base: S = origin.base  # pyright: ignore[reportAssignmentType]  # a site is derived from one of its own kind
    if not origin.cotangent:
        outputs = fill(origin.outputs, seen, [False] * len(origin.outputs))
        asked = tuple(fill(origin.primals, wanted, [False] * len(origin.primals)))
        paths = select(base.paths, asked)
        results = [
            Result(f"cotangent of {path}", operand.shape, operand.dtype)
            for path, operand in zip(paths, select(operands, asked), strict=True)
        ]
        return cotangent_site(base, asked, tuple(outputs), results)
    moved = tuple(fill(origin.primals, seen, [False] * len(origin.primals)))
    return tangent_site(base, moved, inexact_outputs(base))


def narrowed(site: S, used: Mask) -> S:
    """A derived site that gives only the outputs in use."""
    origin = site.origin
    if origin is None:
        return site
    base: S = origin.base  # pyright: ignore[reportAssignmentType]  # as above
    if origin.cotangent:
        wanted = tuple(fill(origin.primals, used, [False] * len(origin.primals)))
        return cotangent_site(base, wanted, origin.outputs, select(site.results, used))
    return tangent_site(base, origin.primals, tuple(fill(origin.outputs, used, [False] * len(origin.outputs))))


def narrowed_axes(axes: Axes, used: Mask) -> Axes:
    """The recorded axes of a site that gives only the outputs in use."""
    return tuple(
        replace(axis, outputs=None if axis.outputs is None else tuple(select(axis.outputs, used))) for axis in axes
    )


def differentiated_axes(axes: Axes, passed: int, nonzero: Mask, outputs: Mask) -> Axes:
    """The recorded axes of a tangent site: tangents are mapped as their primals are, and give what these give.

    The outputs that are passed to it are those of each element.
    """
    return tuple(
        replace(
            axis,
            in_batched=(
                *axis.in_batched,
                *(axis.output(j) is not OutAxis.ABSENT for j in range(passed)),
                *select(axis.in_batched, nonzero),
            ),
            outputs=None if axis.outputs is None else tuple(select(axis.outputs, outputs)),
        )
        for axis in axes
    )


def transposed_axes(axes: Axes, primals: int, seen: Sequence[int], outputs: Sequence[int | None]) -> Axes:
    """The recorded axes of a transposed site.

    An operand that was repeated along an axis gets a cotangent that is summed over it, and the other way round.

    Args:
        axes: The axes of the site that is transposed.
        primals: How many operands stay as they are.
        seen: The outputs whose cotangents are operands now.
        outputs: For each output now, the operand whose cotangent it is; None for one that nothing asks for.
    """

    def transposed(axis: BatchAxis) -> BatchAxis:
        given = tuple(axis.output(j) is not OutAxis.SUMMED for j in seen)
        asked = (operand is None or axis.in_batched[operand] for operand in outputs)
        kept = tuple(OutAxis.KEPT if is_mapped else OutAxis.SUMMED for is_mapped in asked)
        return replace(axis, in_batched=(*axis.in_batched[:primals], *given), outputs=kept)

    return tuple(transposed(axis) for axis in axes)
