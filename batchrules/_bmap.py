"""`bmap`: `jax.vmap` in chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import jax

from batchrules._bmap_axes import Arguments, flatten_arguments
from batchrules._bmap_loop import ChunkPlan, plan_chunks
from batchrules._bmap_program import Layout, Program
from batchrules._bmap_reduce import check_reduce, reductions_of
from batchrules._bmap_trace import trace_element


@dataclass(frozen=True)
class Mapping:
    """Everything that was said to `bmap`."""

    fun: Callable[..., Any]
    in_axes: Any
    out_axes: Any
    batch_size: int | str | None
    axis_name: Any
    axis_size: int | None
    checkpoint: bool
    reduce: Any
    max_bytes: int | None
    progress: bool | str

    def vmap(self, fun: Callable[..., Any] | None = None, in_axes: Any = "as given") -> Callable[..., Any]:
        return jax.vmap(
            self.fun if fun is None else fun,
            in_axes=self.in_axes if isinstance(in_axes, str) else in_axes,
            out_axes=self.out_axes,
            axis_name=self.axis_name,
            axis_size=self.axis_size,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = flatten_arguments(self.in_axes, args, kwargs)
        size = arguments.size(self.axis_size) if arguments else None
        if arguments is None or size is None:
            return self.vmap()(*args, **kwargs)  # which says what is wrong
        return self._program(arguments, size).run(arguments.mapped)

    def _program(self, arguments, size):
        element = trace_element(self.fun, arguments, self.vmap, self.out_axes)
        return Program(
            element, tuple(arguments.mapped_axes), tuple(reductions_of(self.reduce, element.treedef)),
            Layout(size), plan_chunks(size, self.batch_size), self.checkpoint)


def bmap(fun=None, in_axes=0, out_axes=0, *, batch_size, axis_name=None, axis_size=None, checkpoint=False, reduce=None,
         max_bytes=None, progress=False):
    check_reduce(reduce)
    m = Mapping(fun, in_axes, out_axes, batch_size, axis_name, axis_size, checkpoint, reduce, max_bytes, progress)
    return functools.wraps(fun)(lambda *a, **k: m(*a, **k))
