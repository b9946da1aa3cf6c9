"""Which runner executes a site: its own code, the Jacobian of its base, or finite differences of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from batchrules import _jacobian
from batchrules._batch import Axes
from batchrules._errors import MissingEndpointError
from batchrules._finite_difference import Difference
from batchrules._host_body import Endpoint
from batchrules._host_difference import DifferenceRunner
from batchrules._host_elements import Array
from batchrules._host_frame import Shapes
from batchrules._host_runner import Runner
from batchrules._host_site import HostSite
from batchrules._sites import missing_endpoint
from batchrules._surroundings import EAGER, Surroundings

_OWN_ENDPOINTS = " The derivative of an endpoint is given by making it a host_call with endpoints of its own."

RunBatch = Callable[..., tuple[Array, ...]]


def runner(site: HostSite, axes: Axes, shapes: Shapes, around: Surroundings = EAGER) -> RunBatch:
    """What executes a recorded batch.

    Args:
        site: The call site.
        axes: The recorded axes; none for a single call.
        shapes: The shape of each operand, with its mapped axes in front.
        around: What surrounds the run.

    Raises:
        MissingEndpointError: A derivative that no endpoint gives.
    """
    if site.origin is None:
        return Runner(site, axes, shapes, around)
    base: HostSite = site.origin.base  # pyright: ignore[reportAssignmentType]  # derived from one of its own kind
    if _jacobian.serves(site, axes):
        return JacobianRunner(site, base, axes, around)
    which = "vjp" if site.origin.cotangent else "jvp"
    endpoint: Endpoint | None = getattr(base.body.endpoints, which)
    if endpoint is None:
        raise _missing(base, which)
    if isinstance(endpoint.function, Difference):
        return DifferenceRunner(site, base, axes, endpoint.function, around)
    return Runner(site, axes, shapes, around)


def _missing(base: HostSite, which: str) -> MissingEndpointError:
    """The error for a derivative that no endpoint gives; `base` is the function, or one of its derivatives."""
    remedies = dict(base.remedies)
    if base.origin is None:
        return missing_endpoint(base.body, which, remedy=remedies.get(which))
    function: HostSite = base.origin.base  # pyright: ignore[reportAssignmentType]  # as above
    kind = "vjp" if base.origin.cotangent else "jvp"
    endpoint = getattr(function.body.endpoints, kind)
    serving = endpoint or function.body.endpoints.jacobian
    if serving is None:
        # Under jit only the last derivative may be left of a program; that it has no first one is what is wrong.
        return _missing(function, kind)
    by_differences = isinstance(serving.function, Difference)
    if endpoint is not None and not by_differences:
        return missing_endpoint(base.body, which, _OWN_ENDPOINTS, remedies.get("second"))
    by = "finite differences" if by_differences else "the jacobian endpoint"
    ways = f"Pass {kind}= that is a host_call with a {which}= (or a jacobian=) of its own."
    return MissingEndpointError(
        f"{base.body.name} is made by {by}, for first derivatives only, and this derivative of a derivative needs its "
        f"{which}. {base.remedy('second', ways)}"
    )


class JacobianRunner:
    """Runs a derived site by the Jacobian of its base: as many calls as the primals are mapped for, no more."""

    def __init__(self, site: HostSite, base: HostSite, axes: Axes, around: Surroundings) -> None:
        self._site = site
        self._base = base
        self._axes = axes
        self._around = around
        self._blocks: RunBatch | None = None

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        """The outputs, with the axes that they keep in front."""
        fixed = len(arrays) - self._site.linear
        if self._blocks is None:
            self._blocks = self._runner(arrays)
        blocks = self._blocks(*arrays[:fixed])
        with np.errstate(all="ignore"):
            return tuple(_jacobian.contracted(np, self._site, self._axes, blocks, arrays[fixed:]))

    def _runner(self, arrays: Sequence[Array]) -> RunBatch:
        of = _jacobian.jacobian_site(self._site, self._axes, arrays)
        axes = _jacobian.primal_axes(self._site, self._axes)
        function = self._base.body.endpoints.jacobian.function
        if isinstance(function, Difference):
            return DifferenceRunner(of, self._base, axes, function, self._around).blocks
        return Runner(of, axes, [array.shape for array in arrays[: len(of.paths)]], self._around)
