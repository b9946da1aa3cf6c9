"""One mapped bind of a registered primitive: settle the method and execute the batch in JAX operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batchrules import _rules, _sharded
from batchrules._batch import Axes, BatchAxis
from batchrules._methods import Choice
from batchrules._registration import Registration


@dataclass(eq=False)
class MappedBind:
    """One mapped bind.

    Attributes:
        registration: The rule.
        axis_data: What JAX says of the mapped axis.
        in_batched: For each operand, whether it is mapped.
        params: The primitive's parameters.
        apply: `apply(choice, arrays, size)` binds: one element for size None, else so many at once.
        results: What each output of one element is: things with `.shape` and `.dtype`.
    """

    registration: Registration
    axis_data: Any
    in_batched: tuple[bool, ...]
    params: dict[str, Any]
    apply: Callable[[Choice, Sequence[Any], int | None], Sequence[Any]]
    results: Sequence[Any]

    def run(self, arrays: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
        """The outputs and their mapped axes; the arrays have their mapped axis in front."""
        axis = BatchAxis(self.axis_data.size, self.in_batched, mesh_axis=self.axis_data.explicit_mesh_axis)
        if axis.mesh_axis is not None:
            return self._run_per_shard(axis, arrays)
        outputs = self._run_local((axis,), arrays)
        return [output.array for output in outputs], [0 if output.batched else None for output in outputs]

    def _run_per_shard(self, axis: BatchAxis, arrays: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
        # Inside, each output varies over the devices by its type; so one that depends on no mapped operand has to be
        # repeated here, or its type would not allow it out.
        def one_device(axes: Axes, shards: Sequence[Any]) -> list[Any]:
            return [_rules.with_all_axes(output, axes) for output in self._run_local(axes, shards)]

        values = _sharded.per_shard(one_device, (axis,), arrays, len(self.results))
        return values, [0] * len(values)

    def _run_local(self, axes: Axes, arrays: Sequence[Any]) -> list[_rules.Output]:
        registration = self.registration
        choice = registration.choose(axes, arrays, self.params)
        plan = _rules.Plan(choice, registration.batch_size, registration.where, self.results)
        return _rules.run(functools.partial(self.apply, choice), axes, arrays, plan)
