"""One device calls, and the devices that hold the same data share its results and its failure.

This code runs per device, inside a fully manual `jax.shard_map`. A failure must reach all devices at once: one that
raised alone would leave the others waiting in a collective, until XLA aborts the process.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from batchrules import _batch, _callbacks, _placement
from batchrules._batch import Axes
from batchrules._host_runners import runner
from batchrules._host_site import HostSite
from batchrules._jax_versions import Primitive
from batchrules._surroundings import Surroundings

attempt_p = Primitive("batchrules_attempt")
attempt_p.multiple_results = True
raise_p = Primitive("batchrules_raise")
raise_p.multiple_results = True

_TICKET_BITS = 20
_KEPT = 8


class Attempts:
    """The failures of one call site, by ticket. Ticket 0 means that nothing failed."""

    def __init__(self, site: HostSite, axes: Axes, shapes: Sequence[tuple[int, ...]], *, shard: bool) -> None:
        self._run = runner(site, axes, shapes, Surroundings(compiled=True, shard=shard))
        self._nothing = [np.zeros(*_output(site, axes, i)) for i in range(len(site.results))]
        self._name = site.name
        self.arguments = len(shapes)
        self._failures: dict[int, BaseException] = {}
        # Tickets of different processes differ: one that another process reports is not looked up among one's own.
        self._first_ticket = jax.process_index() << _TICKET_BITS
        self._tickets = itertools.count(1)
        self._lock = threading.Lock()

    def attempt(self, *arrays: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        """The outputs and ticket 0; or zeros and the ticket of the failure."""
        try:
            return (*self._run(*arrays), np.int32(0))
        # Whatever the foreign code raises, KeyboardInterrupt too, must be carried to every device by `report`.
        except BaseException as error:  # noqa: BLE001
            return (*self._nothing, np.int32(self._keep(error)))

    def report(self, ticket: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        """Raise the failure with that ticket."""
        failure = self._failures.get(int(ticket))
        if failure is None:
            raise RuntimeError(f"{self._name} failed in the process that called it; see the error raised there.")
        raise failure

    def _keep(self, error: BaseException) -> int:
        with self._lock:
            ticket = self._first_ticket + (next(self._tickets) % (1 << _TICKET_BITS) or 1)
            self._failures[ticket] = error
            while len(self._failures) > _KEPT:
                self._failures.pop(next(iter(self._failures)))
        return ticket


@dataclass(frozen=True)
class Team:
    """The devices of one `shard_map`, by mesh axis.

    Attributes:
        mesh: The mesh.
        sharing: The axes along which devices hold the same data: one of them calls.
        everyone: All axes that the devices span: a failure is told along all of them.
    """

    mesh: Any
    sharing: tuple[Any, ...]
    everyone: tuple[Any, ...]


def call(site: HostSite, axes: Axes, team: Team, rank: jax.Array, *operands: Any) -> list[Any]:
    """The outputs on this device: its own call's, or those of the device that calls for it.

    `rank` holds this device's number among those that share its data; number 0 calls.
    """
    local = _placement.local_axes(axes, team.mesh)
    attempts = Attempts(site, local, [operand.shape for operand in operands], shard=_placement.is_sharded(axes))
    nothing = [*(jnp.zeros(*_output(site, local, i)) for i in range(len(site.results))), jnp.int32(0)]

    def attempt(*arrays: Any) -> list[Any]:
        return attempt_p.bind(*arrays, *nothing, attempts=attempts)

    def wait(*arrays: Any) -> list[Any]:
        del arrays
        return nothing

    *outputs, ticket = jax.lax.cond(rank[0] == 0, attempt, wait, *operands) if team.sharing else attempt(*operands)
    _raise_everywhere(attempts, jax.lax.pmax(ticket, team.everyone))
    shared = [_shared(output, team.sharing) for output in outputs]
    return [_placement.summed_over_devices(output, axes, i) for i, output in enumerate(shared)]


def _raise_everywhere(attempts: Attempts, ticket: jax.Array) -> None:
    jax.lax.cond(ticket > 0, lambda t: raise_p.bind(t, attempts=attempts)[0], lambda t: t, ticket)


def _shared(output: jax.Array, sharing: tuple[Any, ...]) -> jax.Array:
    """The leader's output, bit for bit, on all devices that share it; the others hold zeros."""
    if not sharing:
        return output
    if jnp.iscomplexobj(output):
        return jax.lax.complex(_shared(output.real, sharing), _shared(output.imag, sharing))
    if output.dtype == jnp.bool_:
        return jax.lax.psum(output.astype(jnp.uint8), sharing).astype(jnp.bool_)
    if jnp.issubdtype(output.dtype, jnp.integer):
        return jax.lax.psum(output, sharing)
    # Adding zeros as floating-point numbers would turn -0.0 into 0.0.
    bits = jax.lax.bitcast_convert_type(output, jnp.dtype(f"uint{8 * output.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(jax.lax.psum(bits, sharing), output.dtype)


def _output(site: HostSite, axes: Axes, output: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    result = site.results[output]
    return _batch.output_shape(axes, output, result.shape), result.dtype


@attempt_p.def_abstract_eval
def _attempt_types(*avals: Any, attempts: Attempts) -> tuple[Any, ...]:
    return avals[attempts.arguments :]


@raise_p.def_abstract_eval
def _raise_types(ticket: Any, *, attempts: Attempts) -> tuple[Any, ...]:
    del attempts
    return (ticket,)


def _lower_attempt(ctx: mlir.LoweringRuleContext, *operands: Any, attempts: Attempts) -> Sequence[Any]:
    # What a waiting device gives stands among the operands for its types only.
    given = dataclasses.replace(ctx, avals_in=ctx.avals_in[: attempts.arguments])
    return _callbacks.emit(given, attempts.attempt, operands[: attempts.arguments])


def _lower_raise(ctx: mlir.LoweringRuleContext, ticket: Any, *, attempts: Attempts) -> Sequence[Any]:
    return _callbacks.emit(ctx, attempts.report, [ticket], has_side_effect=True)


mlir.register_lowering(attempt_p, _lower_attempt)
mlir.register_lowering(raise_p, _lower_raise)
