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

import jax.numpy as jnp
import numpy as np

from batchrules._batch import Axes, BatchAxis, OutAxis
from batchrules._device_site import Body, Cotangent, DeviceSite, Origin, Primal, Tangent, fill, select
from batchrules._endpoints import GivenCotangent, GivenTangent
from batchrules._recording import Result

Mask = tuple[bool, ...]


def inexact_outputs(site: DeviceSite) -> Mask:
    """For each output, whether it can have a tangent."""
    return tuple(bool(jnp.issubdtype(result.dtype, np.inexact)) for result in site.results)


def tangent_site(site: DeviceSite, nonzero: Mask) -> DeviceSite:
    """The site of the tangents of the inexact outputs; its operands are the primals, then the nonzero tangents."""
    inexact = inexact_outputs(site)
    count = len(nonzero)
    moving = [i for i in range(count) if nonzero[i]]
    request = replace(
        site.request,
        tied=(*site.request.tied, *((primal, count + k) for k, primal in enumerate(moving))),
        followers=site.request.followers + len(moving),
    )
    return DeviceSite(
        body=_tangent_body(site.body, nonzero, inexact),
        name=f"{site.name} (jvp)",
        paths=(*site.paths, *(f"tangent of {site.paths[i]}" for i in moving)),
        results=tuple(select(site.results, inexact)),
        request=request,
        batch_size=site.batch_size,
        axis_names=site.axis_names,
        linear=len(moving),
        origin=Origin(site, nonzero, inexact, cotangent=False),
    )


def _tangent_body(body: Body, nonzero: Mask, inexact: Mask) -> Body:
    if isinstance(body, Primal) and body.endpoints.given:
        return GivenTangent(body, nonzero, inexact)
    return Tangent(body, nonzero, inexact)


def cotangent_site(site: DeviceSite, wanted: Mask, seen: Mask, operands: Sequence[Result]) -> DeviceSite:
    """The site of the cotangents of the wanted primals; its operands are the primals, then the seen cotangents.

    `operands` are the primals as one element sees them.
    """
    count = len(wanted)
    outputs = [i for i, is_seen in enumerate(seen) if is_seen]
    batched = {i for i in range(count) if wanted[i]} | set(range(count, count + len(outputs)))
    request = replace(
        site.request, batched=site.request.batched | batched, followers=site.request.followers + len(outputs)
    )
    return DeviceSite(
        body=_cotangent_body(site.body, wanted, seen),
        name=f"{site.name} (vjp)",
        paths=(*site.paths, *(f"cotangent of output {site.results[i].path or i}" for i in outputs)),
        results=tuple(select(operands, wanted)),
        request=request,
        batch_size=site.batch_size,
        axis_names=site.axis_names,
        linear=len(outputs),
        origin=Origin(site, wanted, seen, cotangent=True),
    )


def _cotangent_body(body: Body, wanted: Mask, seen: Mask) -> Body:
    if isinstance(body, Primal) and body.endpoints.given:
        return GivenCotangent(body, wanted, seen)
    return Cotangent(body, wanted, seen)


def transposed_site(site: DeviceSite, wanted: Mask, seen: Mask, operands: Sequence[Result]) -> DeviceSite:
    """The transpose of a derived site in what it is linear in.

    Args:
        site: A tangent or cotangent site.
        wanted: For each of its linear operands, whether its cotangent is asked for.
        seen: For each of its outputs, whether it has a cotangent.
        operands: The primals, as one element sees them.

    Returns:
        A site whose operands are the primals, then the seen cotangents. A cotangent site gives the wanted ones; a
        tangent site gives one output for each inexact output of its base.
    """
    origin = site.origin
    if origin is None:
        raise TypeError(f"{site.name} is not linear in its operands, so it has no transpose.")
    if not origin.cotangent:
        outputs = fill(origin.outputs, seen, [False] * len(origin.outputs))
        asked = fill(origin.primals, wanted, [False] * len(origin.primals))
        return cotangent_site(origin.base, tuple(asked), tuple(outputs), operands)
    return tangent_site(origin.base, tuple(fill(origin.primals, seen, [False] * len(origin.primals))))


def differentiated_axes(axes: Axes, nonzero: Mask, inexact: Mask) -> Axes:
    """The recorded axes of a tangent site: tangents are mapped as their primals are, and give what these give."""
    return tuple(
        replace(
            axis,
            in_batched=(*axis.in_batched, *select(axis.in_batched, nonzero)),
            outputs=None if axis.outputs is None else tuple(select(axis.outputs, inexact)),
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
