"""The endpoints of a host call, of a function that is given with all its derivatives.

They bring what they are given to equal leading dimensions, and refuse what no endpoint must ever be given: leads that
the method does not send.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from foreign import Foreign, Log
from host_derivatives import Smooth

import batchrules

METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")
VECTORISED = METHODS[1:]
# What a user may give.
EITHER = {"jvp, vjp": ("jvp", "vjp"), "jacobian": ("jacobian",)}
GIVEN = {**EITHER, "all": ("jvp", "vjp", "jacobian")}


class Point:
    """What one call of an endpoint is given, with the leads that its method sends, and the same with equal leads."""

    def __init__(self, smooth: Smooth, method: str, args: Any, outputs: Any, *moving: Any) -> None:
        self.smooth = smooth
        self.lead: tuple[int, ...] = ()
        shown = [(args, self.lead_of(args)), *((part, self.lead_of(part)) for part in moving)]
        leads = [lead for _, part in shown for lead in part if lead is not None]
        if outputs is not None:
            leads += [lead for lead in self.lead_of(outputs) if lead is not None]
        self.lead = np.broadcast_shapes(*leads)
        check_leads(method, leads, self.lead)
        self.args = self.along(args)
        self.outputs = smooth.foreign.function(np, *self.args) if outputs is None else self.across(outputs)

    def _shapes(self, part: Any) -> list[tuple[Any, tuple[int, ...]]]:
        """The arrays of something like the outputs, or like the arguments, each with its shape in one element."""
        if isinstance(part, dict):
            assert part.keys() == self.smooth.results.keys()
            return [(part[name], shape) for name, shape in self.smooth.results.items()]
        return list(zip(part, self.smooth.foreign.shapes, strict=True))

    def lead_of(self, part: Any) -> list[tuple[int, ...] | None]:
        """The leading dimensions of each array; None for none."""
        return [None if array is None else lead_of(array, shape) for array, shape in self._shapes(part)]

    def _full(self, array: Any, shape: tuple[int, ...]) -> Any:
        if array is None:
            return np.zeros((*self.lead, *shape))
        lead = lead_of(array, shape) or (1,) * len(self.lead)
        return np.broadcast_to(array.reshape((*lead, *shape)), (*self.lead, *shape))

    def along(self, tangents: Any) -> list[Any]:
        """Something like the arguments, zeros for None, with equal leads."""
        return [self._full(array, shape) for array, shape in self._shapes(tangents or [None] * len(self.shapes))]

    def across(self, cotangents: Any) -> dict[str, Any]:
        """Something like the outputs, zeros for None, with equal leads."""
        shapes = self._shapes(cotangents or dict.fromkeys(self.smooth.results))
        return {name: self._full(*pair) for name, pair in zip(self.smooth.results, shapes, strict=True)}

    @property
    def shapes(self) -> Any:
        """The shapes of the arguments of one element."""
        return self.smooth.foreign.shapes

    def lead_alike(self, part: Any, moves: Any) -> None:
        """Each of the second must lead like its fellow of the first."""
        for lead, of_move in zip(self.lead_of(part), self.lead_of(moves), strict=True):
            assert of_move in {None, lead}, f"a tangent leads with {of_move}, its argument with {lead}"

    def lead_fully(self, part: Any, needed: Any) -> None:
        """Those that are needed must lead with the size of the batch."""
        needed = needed.values() if isinstance(needed, dict) else needed
        for lead, is_needed in zip(self.lead_of(part), needed, strict=True):
            assert not is_needed or lead == self.lead, f"a cotangent is needed, the lead is {lead} of {self.lead}"


def lead_of(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading dimensions of an array: none or one."""
    assert type(array) is np.ndarray, type(array)
    rank = array.ndim - len(shape)
    assert rank in {0, 1}, f"{array.shape} is no batch of {shape}"
    assert array.shape[rank:] == shape, f"{array.shape} is no batch of {shape}"
    return array.shape[:rank]


def check_leads(method: str, leads: Sequence[tuple[int, ...]], most: tuple[int, ...]) -> None:
    """Refuse leads that the method does not send."""
    allowed = {
        "sequential": [()],
        "broadcast_all": [most],
        "expand_dims": [most, (1,) * len(most)],
        "legacy_vectorized": [most, ()],
    }
    assert all(lead in allowed[method] for lead in leads), f"{method} sends no leads like {leads}"


def only(values: Iterable[Any], needed: Iterable[Any]) -> tuple[Any, ...]:
    """The values that are needed, None for the others."""
    return tuple(value if is_needed else None for value, is_needed in zip(values, needed, strict=True))


def present(part: Any) -> Any:
    """Which of the arrays are not None."""
    if isinstance(part, dict):
        return {name: value is not None for name, value in part.items()}
    return tuple(value is not None for value in part)


class Endpoints:
    """The endpoints of a host call of that function; they count their calls, and check what they are given."""

    def __init__(self, smooth: Smooth, method: str) -> None:
        self.smooth = smooth
        self.method = method
        self.logs = {name: Log() for name in ("call", "jvp", "vjp", "jacobian")}
        self.asked: list[Any] = []

    @property
    def counts(self) -> dict[str, int]:
        """How many calls there were of each endpoint that was called, the function's own among them."""
        return {name: log.count for name, log in self.logs.items() if log.count}

    def host_call(self, given: Sequence[str], **options: Any) -> Callable[..., Any]:
        """The host call with these endpoints."""
        endpoints = {name: getattr(self, name) for name in given}
        return self.bare(**endpoints, **options)

    def bare(self, **options: Any) -> Callable[..., Any]:
        """The host call with these options."""
        foreign = self.smooth.foreign
        return batchrules.host_call(self.call, foreign.promise, method=self.method, name=foreign.name, **options)

    def call(self, *args: Any) -> Any:
        """The function."""
        self.logs["call"].add(args)
        return self.smooth.foreign(np, *args)

    def jvp(self, args: Any, tangents: Any, outputs: Any = None) -> Any:
        """The output tangents."""
        self._note("jvp", (*args, *tangents), present(tangents))
        point = self._point(args, outputs, tangents)
        point.lead_alike(args, tangents)
        return self.smooth.push(point.args, point.along(tangents), point.outputs)

    def vjp(self, args: Any, cotangents: Any, needed: Any, outputs: Any = None) -> Any:
        """The cotangents of the arguments, None for those that nobody needs."""
        self._note("vjp", (*args, *cotangents.values()), (present(cotangents), needed))
        point = self._point(args, outputs, cotangents)
        point.lead_fully(args, needed)
        return only(self.smooth.pull(point.args, point.across(cotangents), point.outputs), needed)

    def jacobian(self, args: Any, needed: Any, outputs: Any = None) -> Any:
        """The blocks of each output in each needed argument."""
        self._note("jacobian", args, needed)
        point = self._point(args, outputs)
        point.lead_fully(args, needed)
        rows = self.smooth.blocks(point.args, point.outputs)
        return {name: only(row, needed) for name, row in rows.items()}

    def _note(self, name: str, arrays: Any, asked: Any) -> None:
        self.logs[name].add([array for array in arrays if array is not None])
        self.asked.append((name, asked))

    def _point(self, args: Any, outputs: Any, *moving: Any) -> Point:
        return Point(self.smooth, self.method, args, outputs, *(part for part in moving if part is not None))

    # What the endpoints of the endpoints are: the function's second derivatives, and again its first.

    def jvp_of_jvp(self, primals: Any, moves: Any, outputs: Any = None) -> Any:
        """How the output tangents move with the arguments, and with the tangents."""
        (args, tangents), (dargs, dtangents) = primals, moves
        point = self._point(args, outputs, tangents, dargs, dtangents)
        t, u, dt = (point.along(part) for part in (tangents, dargs, dtangents))
        curved = self.smooth.second(point.args, t, u, point.outputs)
        straight = self.smooth.push(point.args, dt, point.outputs)
        return {name: curved[name] + straight[name] for name in curved}

    def vjp_of_jvp(self, primals: Any, cotangents: Any, needed: Any, outputs: Any = None) -> Any:
        """The cotangents of the arguments and of the tangents."""
        args, tangents = primals
        point = self._point(args, outputs, tangents, cotangents)
        point.lead_fully(args, needed[0])
        t, c = point.along(tangents), point.across(cotangents)
        curved = self.smooth.second_pull(point.args, t, c, point.outputs)
        return only(curved, needed[0]), only(self.smooth.pull(point.args, c, point.outputs), needed[1])

    def jvp_of_vjp(self, primals: Any, moves: Any, outputs: Any = None) -> Any:
        """How the cotangents of the arguments move with the arguments, and with the cotangents of the outputs."""
        (args, cotangents, needed), (dargs, dcotangents, _) = primals, moves
        point = self._point(args, outputs, cotangents, dargs, dcotangents)
        u, c, dc = point.along(dargs), point.across(cotangents), point.across(dcotangents)
        curved = self.smooth.second_pull(point.args, u, c, point.outputs)
        straight = self.smooth.pull(point.args, dc, point.outputs)
        return only([a + b for a, b in zip(curved, straight, strict=True)], needed)

    def vjp_of_vjp(self, primals: Any, cotangents: Any, needed: Any, outputs: Any = None) -> Any:
        """The cotangents of the arguments and of the cotangents that the outputs had."""
        args, inner, _ = primals
        point = self._point(args, outputs, cotangents, inner)
        point.lead_fully(args, needed[0])
        w, c = point.along(cotangents), point.across(inner)
        pushed = self.smooth.push(point.args, w, point.outputs)
        asked = {name: pushed[name] if is_needed else None for name, is_needed in needed[1].items()}
        return only(self.smooth.second_pull(point.args, w, c, point.outputs), needed[0]), asked, None

    def twice(self) -> dict[str, Any]:
        """The `jvp` and `vjp` endpoints as host calls that have derivatives of their own."""
        jvp = batchrules.host_call(
            self.jvp, lambda args, _: self.smooth.foreign.promise(*args), jvp=self.jvp_of_jvp, vjp=self.vjp_of_jvp
        )
        vjp = batchrules.host_call(
            self.vjp,
            lambda args, _, needed: only(args, needed),
            static_argnames="needed",
            jvp=self.jvp_of_vjp,
            vjp=self.vjp_of_vjp,
        )
        return {"jvp": jvp, "vjp": vjp}


def with_endpoints(foreign: Foreign, method: str, endpoints: Any, given: Sequence[str], **options: Any) -> Any:
    """The host call of a foreign function with some of its endpoints."""
    chosen = {name: endpoints[name] for name in given}
    return batchrules.host_call(
        lambda *args: foreign(np, *args), foreign.promise, method=method, name=foreign.name, **chosen, **options
    )


def on_matrix(diagonal: Any) -> Any:
    """A diagonal matrix for each row: the block of a function of each number alone."""
    return np.eye(diagonal.shape[-1]).astype(diagonal.dtype) * diagonal[..., None]


def zeros_for_none(args: Any, tangents: Any) -> list[Any]:
    """The tangents, zeros for those that there are not."""
    return [np.zeros_like(arg) if tangent is None else tangent for arg, tangent in zip(args, tangents, strict=True)]
