"""A loop over chunks under `vmap`: a loop over chunks with an axis more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching

from batchrules._bmap_body import Body, run, trace
from batchrules._bmap_frame import Frame, Slot
from batchrules._bmap_loop import loop, loop_p


def _batch(
    axis: Any, operands: Sequence[Any], dims: Sequence[int | None], *, bodies: tuple[Body, ...], frame: Frame
) -> tuple[list[Any], list[int | None]]:
    values = list(operands)
    over: dict[int, _OverBatch] = {}

    def put_in_front(batched: Sequence[bool]) -> None:
        for i, is_batched in enumerate(batched):
            if is_batched and values[i] is operands[i]:
                values[i] = batching.bdim_at_front(operands[i], dims[i], axis.size, axis.explicit_mesh_axis)

    def find(segment: int, batched: list[bool]) -> list[bool]:
        put_in_front(batched)
        types = replace(frame, inputs=_deeper(frame.inputs, batched)).body_types(segment, map(jax.typeof, values))
        over[segment] = _OverBatch(axis, bodies[segment], frame.of_inputs(segment, batched), types)
        return frame.for_outputs(segment, over[segment].differ, default=False)

    batched, gives = frame.with_carried([dim is not None for dim in dims], find)
    put_in_front(batched)
    deeper = replace(
        frame,
        inputs=_deeper(frame.inputs, batched),
        outputs=_deeper(frame.outputs, gives),
        in_place=tuple((i, j) for i, j in frame.in_place if batched[i] == gives[j]),
    )

    def step(segment: int, given: list[Any]) -> list[Any]:
        return over[segment].run(given, frame.of_outputs(segment, gives))

    return loop(step, deeper, values), _lead(gives)


class _OverBatch:
    """A body over a batch, which is the first axis of what it takes and gives.

    Attributes:
        differ: For each of its results whether it differs within the batch. The others have no such axis.
    """

    def __init__(self, axis: Any, body: Body, batched: Sequence[bool], types: Sequence[Any]) -> None:
        self._axis, self._body, self._batched = axis, body, batched
        self.differ: list[bool] = []
        self._over = trace(self._map, types)

    def _map(self, *values: Any) -> list[Any]:
        found = [_Found() for _ in self._body.out_avals]
        differs = next(compress(values, self._batched), np.zeros(self._axis.size))

        def one(differs: Any, *values: Any) -> tuple[()]:
            for x, result in zip(run(self._body, values), found, strict=True):
                _found_p.bind(x, differs, result=result)
            return ()

        jax.vmap(
            one,
            in_axes=(0, *_lead(self._batched)),
            axis_size=self._axis.size,
            axis_name=self._axis.name,
            spmd_axis_name=self._axis.spmd_name,
        )(differs, *values)
        self.differ = [result.dim is not None for result in found]
        return [x.value if x.dim is None else self._front(x.value, x.dim) for x in found]

    def _front(self, x: Any, dim: int | None) -> Any:
        return batching.bdim_at_front(x, dim, self._axis.size, self._axis.explicit_mesh_axis)

    def run(self, values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
        """Its results; those that are wanted so are repeated along the batch where they do not differ."""
        results = zip(run(self._over, values), self.differ, wanted, strict=True)
        return [self._front(x, None) if is_wanted and not differs else x for x, differs, is_wanted in results]


@dataclass(eq=False)
class _Found:
    """A result as JAX has it while it maps: with the batch along `dim`, or None where it does not differ."""

    value: Any = None
    dim: int | None = None


def _note(args: Sequence[Any], dims: Sequence[int | None], *, result: _Found) -> tuple[Any, int | None]:
    result.value, result.dim = args[0], dims[0]
    return args[1], dims[1]


# JAX knows what differs within a batch, and tells a primitive that each result goes through, beside something that does
# differ. Only while JAX maps is it ever bound, so no program has it.
_found_p = Primitive("bmap_found")
batching.primitive_batchers[_found_p] = _note


def _lead(batched: Sequence[bool]) -> list[int | None]:
    return [0 if is_batched else None for is_batched in batched]


def _deeper(slots: Sequence[Slot | None], batched: Sequence[bool]) -> tuple[Slot | None, ...]:
    """The slots, for arrays of which those that are batched have a dimension more in front."""
    return tuple(
        slot._replace(axis=slot.axis + 1) if slot and is_batched else slot
        for slot, is_batched in zip(slots, batched, strict=True)
    )


batching.fancy_primitive_batchers[loop_p] = _batch
