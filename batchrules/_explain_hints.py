"""Where a cheaper choice exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from batchrules import _batch, _jacobian
from batchrules._batch import BatchAxis
from batchrules._explain_plan import Batch, Plan
from batchrules._host_site import HostSite
from batchrules._methods import VECTORISED, as_if_mapped, asked_for
from batchrules._sites import Site

_MANY = 8  # elements that are worth a thread each
_MUCH = 1 << 16  # bytes that are worth a hint


def host_hints(batch: Batch, plan: Plan) -> Iterator[str]:
    """What would make the calls of a host site cheaper."""
    site: HostSite = batch.site  # pyright: ignore[reportAssignmentType]
    yield from _both(batch, plan)
    conduct = site.conduct
    waits = batch.axes and not plan.choice.vectorised and not conduct.allow_jax and conduct.dispatch.executor is None
    if waits and plan.count >= _MANY:
        yield (
            f"{plan.count} elements are called one after another: executor=8 would call them on 8 threads, if the "
            "function waits for something or releases the GIL; any concurrent.futures.Executor will do"
        )


def device_hints(batch: Batch, plan: Plan) -> Iterator[str]:
    """What would make the calls of a device site cheaper."""
    yield from _both(batch, plan)


def _both(batch: Batch, plan: Plan) -> Iterator[str]:
    yield from _jacobian_hint(batch, plan)
    yield from _schema_hint(batch, plan)
    yield from _copies_hint(batch, plan)


def _jacobian_hint(batch: Batch, plan: Plan) -> Iterator[str]:
    site, origin = batch.site, batch.site.origin
    if origin is None or not batch.axes or plan.count < 2 or origin.base.body.endpoints.jacobian is not None:
        return
    if _jacobian.primal_axes(site, batch.axes):
        return
    kind, by = ("cotangents", "jacrev") if origin.cotangent else ("tangents", "jacfwd")
    calls = plan.tally.calls
    if calls.low > 1:
        yield (
            f"{plan.count} {kind} are mapped over unmapped arguments, as jax.{by} does: a jacobian endpoint would make "
            f"these {calls} calls into 1"
        )


def _schema_hint(batch: Batch, plan: Plan) -> Iterator[str]:
    unproven = batch.site.request.method == "auto" and plan.choice == batch.chosen() and not plan.choice.vectorised
    if unproven and batch.axes and plan.count > 1:
        yield (
            f"if the function takes a leading dimension, say so, and these {plan.tally.calls} calls become 1: "
            "schema= or signature= lets method='auto' prove it; method='expand_dims' or 'broadcast_all' asks for it"
        )


def _copies_hint(batch: Batch, plan: Plan) -> Iterator[str]:
    if plan.choice.method != "broadcast_all" or batch.site.request.method != "broadcast_all":
        return
    mapped = as_if_mapped(batch.site.request, _batch.mapped(batch.given_axes, len(batch.given)))
    spared = plan.tally.bytes_in.low - batch.plan(asked_for("expand_dims", mapped)).tally.bytes_in.low
    if spared > _MUCH and 2 * spared > plan.tally.bytes_in.low:
        yield (
            "method='broadcast_all' repeats unmapped arguments for each element: 'expand_dims' would give them once, "
            f"with a leading 1, and spare {spared / 1e6:.3g} MB of {plan.tally.bytes_in.low / 1e6:.3g}"
        )


def takes_a_batch(batch: Batch) -> bool:
    """Whether a site would be vectorised if its arguments were mapped."""
    site: Site = batch.site
    if site.request.method in VECTORISED:
        return True
    if site.request.method != "auto":
        return False
    axis = BatchAxis(2, tuple(True for _ in batch.operands))
    as_mapped = replace(batch, axes=(axis,), operands=[_Led((2, *x.shape)) for x in batch.operands])
    return as_mapped.chosen().vectorised


class _Led:
    """The type of an operand with a leading dimension more; only its shape is asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
