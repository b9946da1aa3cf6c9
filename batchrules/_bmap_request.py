"""Everything that was said to `bmap`, checked, and one call carried out by it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import NamedSharding, get_abstract_mesh

from batchrules._bmap_axes import Arguments, flatten_arguments, refuse_references
from batchrules._bmap_collectives import ChunkedAxis
from batchrules._bmap_memory import abstract, available_bytes, compiled_bytes, largest_batch_size
from batchrules._bmap_plan import ChunkPlan, plan_chunks, plan_one_chunk
from batchrules._bmap_program import Layout, Program
from batchrules._bmap_progress import check_progress, make_bar
from batchrules._bmap_reduce import Fold, Reduction, check_reduce, reductions_of
from batchrules._bmap_sharding import axis_sharding, num_auto_devices, num_shards
from batchrules._bmap_trace import Element, trace_element

# How many choices of batch_size="auto" one mapped function remembers.
MOST_CHOSEN = 128


@dataclass(frozen=True)
class Call:
    """One call's arguments, the length of the mapped axis, and how it is explicitly sharded, if it is."""

    arguments: Arguments
    size: int
    over: NamedSharding | None

    @property
    def shard_size(self) -> int:
        """The number of elements on a device. Only these count for the batch size."""
        return self.size // num_shards(self.over)


@dataclass(frozen=True)
class Request:
    """What was said to `bmap`. `chosen` remembers what `batch_size="auto"` led to, for arguments of each shape."""

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
    chosen: dict[Any, int] = field(default_factory=dict)

    def vmap(self, fun: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
        """`jax.vmap` of a function as it was asked for, but for the axes."""
        return jax.vmap(fun, in_axes, out_axes, axis_name=self.axis_name, axis_size=self.axis_size)

    def plain(self, /, *args: Any, **kwargs: Any) -> Any:
        """`jax.vmap` of the function, called."""
        return self.vmap(self.fun, self.in_axes, self.out_axes)(*args, **kwargs)

    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        """The mapped function, called."""
        call = self._read(args, kwargs)
        if call is None:
            if self.batch_size is not None or self.reduce is not None:
                refuse_references((args, kwargs))
            return self.plain(*args, **kwargs)  # which says what is wrong with the arguments
        if self._is_whole(call) and self.reduce is None and self.progress is False:
            return self.plain(*args, **kwargs)
        element = self._trace(call.arguments)
        program = self.program(call, element, self._choose(call, element))
        return program.run(element.closed, call.arguments.mapped)

    def batch_size_for(self, /, *args: Any, **kwargs: Any) -> int:
        """The batch size for such arguments: no chunk has more elements."""
        call = self._read(args, kwargs)
        if call is None:
            self.plain(*args, **kwargs)
            raise ValueError("bmap: the mapped axis has no length.")
        if self.batch_size != "auto":
            return call.shard_size if self.batch_size is None else min(int(self.batch_size), call.shard_size)
        return self._choose(call, self._trace(call.arguments))

    def _read(self, args: Any, kwargs: Any) -> Call | None:
        arguments = flatten_arguments(self.in_axes, args, kwargs)
        size = arguments.size(self.axis_size) if arguments else None
        if arguments is None or size is None:
            return None
        return Call(arguments, size, axis_sharding(arguments))

    def _is_whole(self, call: Call) -> bool:
        return self.batch_size is None or (self.batch_size != "auto" and int(self.batch_size) >= call.shard_size)

    def _trace(self, arguments: Arguments) -> Element:
        def reduced(treedef: Any) -> set[int]:
            return {i for reduction in reductions_of(self.reduce, treedef) for i in reduction.indices}

        return trace_element(self.fun, arguments, self.vmap, self.out_axes, None if self.reduce is None else reduced)

    def program(self, call: Call, element: Element, batch_size: int) -> Program:
        """The program that carries the call out with this batch size."""
        reductions = tuple(reductions_of(self.reduce, element.treedef))
        is_whole = batch_size >= call.shard_size
        layout, plan = _whole(call) if is_whole else _chunked(call, batch_size, reductions)
        chunked = None if is_whole else ChunkedAxis(self.axis_name, call.size, batch_size)
        if chunked and self.axis_name is not None:
            chunked.refuse(element.axis_names)
        bar = make_bar(self.progress, plan.num_chunks)
        return Program(
            element=element,
            in_axes=tuple(call.arguments.mapped_axes),
            reductions=reductions,
            layout=layout,
            plan=plan,
            checkpoint=self.checkpoint,
            on_chunk=bar and bar.on_chunk,
            axis_name=self.axis_name if is_whole else None,
            chunked=chunked,
        )

    # The largest batch size that fits.

    def _choose(self, call: Call, element: Element) -> int:
        if self.batch_size != "auto":
            return call.shard_size if self.batch_size is None else int(self.batch_size)
        around = element.axis_names - {self.axis_name}
        if around:
            raise ValueError(
                'bmap: batch_size="auto" compiles the function on its own, where the axes around it are not known, and '
                f"it uses {', '.join(sorted(map(repr, around)))}. Give a number."
            )
        silent = replace(self, progress=False)

        def bytes_for(batch_size: int) -> int:
            program = silent.program(call, element, batch_size)
            closed, mapped = ([abstract(x) for x in values] for values in (element.closed, call.arguments.mapped))
            return compiled_bytes(program.run, closed, mapped)

        mapped = tuple((abstract(x), axis) for x, axis in call.arguments.mapped_pairs)
        reduced = tuple(r.indices for r in reductions_of(self.reduce, element.treedef))
        key = (get_abstract_mesh(), mapped, tuple(abstract(x) for x in element.closed), element.outline, reduced)
        return self._remembered(key, call, bytes_for)

    def _remembered(self, key: Any, call: Call, bytes_for: Callable[[int], int]) -> int:
        chosen = self.chosen.get(key)
        if chosen is None:
            limit = self.max_bytes or available_bytes(call.arguments.mapped)
            chosen = self.chosen[key] = largest_batch_size(bytes_for, call.shard_size, limit)
            # The oldest; in one step, because other threads may be here too.
            for old in list(self.chosen)[:-MOST_CHOSEN]:
                self.chosen.pop(old, None)
        return chosen


def _whole(call: Call) -> tuple[Layout, ChunkPlan]:
    return Layout(call.size, num_shards(call.over), call.over), plan_one_chunk(call.shard_size)


def _chunked(call: Call, batch_size: int, reductions: Sequence[Reduction]) -> tuple[Layout, ChunkPlan]:
    if call.over:
        return Layout(call.size, num_shards(call.over), call.over), plan_chunks(call.shard_size, batch_size)
    devices = num_auto_devices()
    keeps_order = any(isinstance(reduction, Fold) for reduction in reductions)
    # Perhaps the axis is spread over some of the devices only.
    blocks = math.gcd(call.size, devices)
    if batch_size < blocks or keeps_order:
        blocks = 1
    return Layout(call.size, blocks), plan_chunks(call.size // blocks, batch_size // blocks)


def check_request(request: Request) -> None:
    """An error for what can be known to be wrong before there are arguments."""
    if not callable(request.fun):
        raise TypeError(f"bmap: fun must be callable; got {request.fun!r}.")
    _check_batch_size(request.batch_size)
    _check_max_bytes(request.max_bytes, request.batch_size)
    if not isinstance(request.checkpoint, bool):
        raise TypeError(f"bmap: checkpoint must be True or False; got {request.checkpoint!r}.")
    check_reduce(request.reduce)
    check_progress(request.progress)
    request.vmap(request.fun, request.in_axes, request.out_axes)  # which checks the axes


def _check_batch_size(batch_size: Any) -> None:
    if batch_size is None or (isinstance(batch_size, str) and batch_size == "auto"):
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral):
        raise TypeError(f'bmap: batch_size must be an int of at least 1, "auto" or None; got {batch_size!r}.')
    if batch_size < 1:
        raise ValueError(f"bmap: batch_size must be at least 1; got {batch_size}. None maps all elements at once.")


def _check_max_bytes(max_bytes: Any, batch_size: Any) -> None:
    if max_bytes is None:
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, numbers.Integral):
        raise TypeError(f"bmap: max_bytes must be an int or None; got {max_bytes!r}.")
    if max_bytes < 1:
        raise ValueError(f"bmap: max_bytes must be at least 1; got {max_bytes}.")
    if batch_size != "auto":
        raise ValueError(f'bmap: max_bytes only says what batch_size="auto" may use; got batch_size={batch_size!r}.')
