"""One foreign equation of a traced program: what it will do, from the same parts that will do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax

from batchrules import _device_primitive, _explain_hints, _explain_source, _jacobian, _placement
from batchrules._batch import Axes
from batchrules._device_body import DeviceBody
from batchrules._device_endpoints import GivenJacobian
from batchrules._device_endpoints import Primal as DevicePrimal
from batchrules._events import name_and_endpoint
from batchrules._explain_count import exactly
from batchrules._explain_dispatch import device_dispatch, host_dispatch
from batchrules._explain_foreign import registration_of
from batchrules._explain_found import Found, Surrounds
from batchrules._explain_plan import Batch, Plan
from batchrules._explain_registered import registered_found
from batchrules._explain_report import MappedAxis
from batchrules._finite_difference import Difference
from batchrules._host_difference import DifferenceRunner
from batchrules._host_primitive import host_call_p
from batchrules._host_runners import JacobianRunner, runner
from batchrules._host_site import HostSite
from batchrules._methods import Choice
from batchrules._sites import Site
from batchrules._surroundings import EAGER
from batchrules._values import name_in

_SKIPS = "skip_zero: elements whose (co)tangents are all zero are not called"


def read(eqn: Any, surrounds: Surrounds) -> list[Found]:
    """What a foreign equation calls."""
    if eqn.primitive is host_call_p:
        return _host(eqn)
    if eqn.primitive is _device_primitive.device_call_p:
        return _device(eqn, surrounds)
    registration = registration_of(eqn)
    return [] if registration is None else [registered_found(eqn, registration)]


class _Local:
    """An equation's batch as one device sees it, and on how many devices it runs."""

    def __init__(self, eqn: Any) -> None:
        self.axes: Axes = eqn.params["axes"]
        self.operands: Sequence[Any] = [variable.aval for variable in eqn.invars]
        self.devices = 1
        if _placement.is_sharded(self.axes):
            mesh = next(x.sharding.mesh for x in self.operands if not x.sharding.mesh.empty)
            local = _placement.local_axes(self.axes, mesh)
            self.operands = [self._shard(i, x, local) for i, x in enumerate(self.operands)]
            for axis, here in zip(self.axes, local, strict=True):
                self.devices *= axis.size // here.size if here.size else 1
            self.axes = local

    def _shard(self, i: int, operand: Any, local: Axes) -> jax.ShapeDtypeStruct:
        sizes = [axis.size for axis in local if axis.in_batched[i]]
        return jax.ShapeDtypeStruct((*sizes, *operand.shape[len(sizes) :]), operand.dtype)

    def spread(self, found: Found) -> Found:
        """What all devices do."""
        if self.devices == 1:
            return found
        return found.repeated(exactly(self.devices), f"{self.devices} devices, each with its shard", 0, None)


# --- host calls ------------------------------------------------------------------------------------------------------


def _host(eqn: Any) -> list[Found]:
    site, local = eqn.params["site"], _Local(eqn)
    source = _explain_source.line_of(eqn)
    return [local.spread(_host_found(part, source)) for part in _host_parts(site, local)]


class _Part(NamedTuple):
    """One of the batches that a host site becomes.

    Attributes:
        batch: The batch.
        notes: What it is.
        moves: Whether it has (co)tangents, which may be zero.
    """

    batch: Batch
    notes: tuple[str, ...] = ()
    moves: bool = False


def _host_parts(site: HostSite, local: _Local) -> list[_Part]:
    """The batches that a site becomes; a MissingEndpointError is what the program would raise."""
    shapes = [tuple(operand.shape) for operand in local.operands]
    served = runner(site, local.axes, shapes)
    if isinstance(served, JacobianRunner):
        return _by_jacobian(site, local)
    if isinstance(served, DifferenceRunner):
        return _by_differences(served, local.operands, columns=False)
    return [_Part(Batch(site, local.axes, local.operands), moves=site.linear > 0)]


def _by_jacobian(site: HostSite, local: _Local) -> list[_Part]:
    of = _jacobian.jacobian_site(site, local.axes, local.operands)
    axes = _jacobian.primal_axes(site, local.axes)
    base: HostSite = site.origin.base  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
    function = base.body.endpoints.jacobian.function
    operands = local.operands[: len(of.paths)]
    if isinstance(function, Difference):
        differences = DifferenceRunner(of, base, axes, function, EAGER)
        return _by_differences(differences, operands, columns=True)
    return [_Part(Batch(of, axes, operands), ("its Jacobian is contracted with all the (co)tangents",))]


def _by_differences(differences: DifferenceRunner, operands: Sequence[Any], *, columns: bool) -> list[_Part]:
    notes = ("finite differences: the function at the points beside", "finite differences: the function itself")
    batches = differences.batches(operands, columns=columns)
    return [_Part(Batch(*batch), (note,), not columns) for batch, note in zip(batches, notes, strict=False)]


def _host_found(part: _Part, source: str | None) -> Found:
    batch = part.batch
    site: HostSite = batch.site  # pyright: ignore[reportAssignmentType]  # a host site's batches are host sites'
    choice = batch.chosen()
    if choice.vectorised and site.trust.distrusts(site):
        choice = Choice("sequential", "a vectorised call of it was seen not to treat its elements one by one")
    plan = batch.plan(choice)
    name, endpoint = name_and_endpoint(site)
    found = _found(batch, plan, (name, endpoint, "host_call"), source)
    skips_zero = part.moves and site.conduct.skip_zero and not choice.vectorised
    return replace(
        found,
        tally=found.tally.at_most() if site.masks or skips_zero else found.tally,
        dispatch=host_dispatch(site.conduct, plan, mapped=bool(batch.axes)),
        notes=(*part.notes, *([_SKIPS] if skips_zero else []), *_host_notes(site, plan)),
        hints=tuple(_explain_hints.host_hints(batch, plan)),
    )


def _host_notes(site: HostSite, plan: Plan) -> list[str]:
    notes = []
    if site.masks:
        notes.append("where: only elements whose mask is True are called")
    if plan.choice.vectorised and site.conduct.verify is not False and plan.first > 1:
        notes.append(
            "verify: 2 or 3 elements are called again, each alone, once for each element shape and now and then"
        )
    if plan.choice.vectorised and site.conduct.on_error == "nan":
        notes.append("on_error='nan': the elements of a call that fails are called again, each alone")
    return notes


# --- device calls ----------------------------------------------------------------------------------------------------


def _device(eqn: Any, surrounds: Surrounds) -> list[Found]:
    site, local = eqn.params["site"], _Local(eqn)
    batch = _device_batch(site, local)
    plan = batch.plan(batch.chosen())
    names = (name_in(_named(site)), _device_endpoint(batch.site.body), "device_call")
    own = replace(
        _found(batch, plan, names, _explain_source.line_of(eqn)),
        dispatch=device_dispatch(plan),
        notes=_device_notes(batch),
        hints=tuple(_explain_hints.device_hints(batch, plan)),
    )
    return [local.spread(own), *_inside(eqn, surrounds, own)]


def _device_batch(site: Any, local: _Local) -> Batch:
    if not _jacobian.serves(site, local.axes):
        return Batch(site, local.axes, local.operands)
    of = _jacobian.jacobian_site(site, local.axes, local.operands)
    return Batch(of, _jacobian.primal_axes(site, local.axes), local.operands[: len(of.paths)])


def _device_notes(batch: Batch) -> tuple[str, ...]:
    body: Any = batch.site.body
    if isinstance(body, GivenJacobian):
        return ("its Jacobian is contracted with all the (co)tangents",)
    of = getattr(body, "of", None)
    return () if of is None else ("JAX differentiates the code of the call: it has no endpoint for this",)


def _named(site: Site) -> str:
    while site.origin is not None:
        site = site.origin.base
    return site.name


def _device_endpoint(body: DeviceBody) -> str:
    names: list[str] = []
    while not isinstance(body, DevicePrimal):
        kind = type(body).__name__
        names.append("jvp" if "Tangent" in kind else "vjp" if "Cotangent" in kind else "jacobian")
        body = getattr(body, "of", None) or body.primal  # pyright: ignore[reportAttributeAccessIssue]
    return ".".join(reversed(names)) or "call"


def _inside(eqn: Any, surrounds: Surrounds, own: Found) -> list[Found]:
    """The foreign calls in the code of a device call; on several devices, its collectives need their surroundings."""
    from batchrules._explain_walk import Walker, flat_walk  # noqa: PLC0415  # which reads equations by this module

    axes: Axes = eqn.params["axes"]
    if surrounds.manual or _placement.is_sharded(axes) or eqn.params["site"].axis_names:
        return []
    types = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in eqn.invars]
    program = jax.make_jaxpr(partial(_device_primitive.execute, eqn.params["site"], axes))(*types)
    return [
        found.repeated(exactly(1), f"device_call {own.name}", 0, None) for found in flat_walk(Walker(read), program)
    ]


# --- both ------------------------------------------------------------------------------------------------------------


def _found(batch: Batch, plan: Plan, names: tuple[str, str, str], source: str | None) -> Found:
    name, endpoint, kind = names
    paths = batch.site.paths
    axes = tuple(
        MappedAxis(axis.size, tuple(path for path, m in zip(paths, axis.in_batched, strict=True) if m))
        for axis in batch.axes
    )
    return Found(
        name=name, endpoint=endpoint, kind=kind, source=source, axes=axes, method=plan.choice.method,
        reason=plan.choice.reason, first=plan.first, last=plan.last, tally=plan.tally, dispatch="",
        mappable=not batch.axes and _explain_hints.takes_a_batch(batch),
    )  # fmt: skip
