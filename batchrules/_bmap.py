"""`bmap`: `jax.vmap` in chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, Protocol, overload

from batchrules._bmap_request import Request, check_request


class ChunkedFunction(Protocol):
    """What `bmap` returns: the mapped function, which also tells its batch size."""

    batch_size_for: Callable[..., int]

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any: ...


BatchSize = int | Literal["auto"] | None


@overload
def bmap(
    fun: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    batch_size: BatchSize,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    checkpoint: bool = False,
    reduce: Any = None,
    max_bytes: int | None = None,
    progress: bool | str = False,
) -> ChunkedFunction: ...


@overload
def bmap(
    fun: None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    batch_size: BatchSize,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    checkpoint: bool = False,
    reduce: Any = None,
    max_bytes: int | None = None,
    progress: bool | str = False,
) -> Callable[[Callable[..., Any]], ChunkedFunction]: ...


def bmap(  # noqa: PLR0913  # the arguments of jax.vmap, and ours
    fun: Callable[..., Any] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    batch_size: BatchSize,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    checkpoint: bool = False,
    reduce: Any = None,
    max_bytes: int | None = None,
    progress: bool | str = False,
) -> Any:
    """Map a function over an axis of its arguments, as `jax.vmap` does, in chunks of at most `batch_size` elements.

    The function is traced once. Chunks are sliced out of the arguments along their own axes and written into the
    results in place, so what is in memory besides arguments and results is one chunk. The result equals
    `jax.vmap`'s, and so do its derivatives. Under `jax.jit` all of it is one compiled program; outside, it is
    compiled anew for each call.

    Args:
        fun: the function of one element. Without it, `bmap` is a decorator.
        in_axes: which axis of each argument is mapped, as for `jax.vmap`: an int, None, or a tuple with a pytree
            prefix for each argument. Keyword arguments are mapped along axis 0.
        out_axes: where the mapped axis goes in each output, as for `jax.vmap`; None for outputs that do not depend
            on it.
        batch_size: the most elements that are computed at once. Chunks are made equal where that takes no more than
            twice as many; otherwise the first is smaller. None, or a number as large as the axis, is plain
            `jax.vmap`. "auto" is the largest for which arguments, results and temporaries of the compiled program
            fit `max_bytes`.
        axis_name: a name for the mapped axis. Collectives over it work where one chunk is the whole axis, and are an
            error elsewhere.
        axis_size: the length of the mapped axis, needed only where no argument is mapped.
        checkpoint: whether reverse-mode derivatives keep nothing of a chunk, and compute it again.
        reduce: how outputs are combined over the mapped axis instead of stacked: "sum", "mean", "max", "min", or
            `(init, combine)` with an associative `combine` of two outputs and its neutral element `init`; or a
            pytree prefix of these for the output, None where it is stacked. Such an output's entry of `out_axes`
            plays no role.
        max_bytes: the limit for "auto"; by default the device's memory, where it tells.
        progress: whether to show a bar over the chunks (with tqdm), or its description.

    Returns:
        The mapped function. Its method `batch_size_for(*args)` tells the batch size for such arguments: no chunk has
        more elements.

    Raises:
        TypeError: an argument of `bmap` has the wrong type.
        ValueError: an argument of `bmap` has an impossible value; no batch size fits; or, when called, a collective
            over `axis_name` would see one chunk only. Axes that do not fit the arguments raise `jax.vmap`'s own errors.
        ImportError: `progress` is asked for and tqdm is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from batchrules import bmap
        >>> squares = bmap(lambda x: x**2, batch_size=2)
        >>> squares(jnp.arange(5.0))
        Array([ 0.,  1.,  4.,  9., 16.], dtype=float32)
        >>> bmap(lambda x: x**2, batch_size=2, reduce="sum")(jnp.arange(5.0))
        Array(30., dtype=float32)
    """
    options = {
        "in_axes": in_axes,
        "out_axes": out_axes,
        "batch_size": batch_size,
        "axis_name": axis_name,
        "axis_size": axis_size,
        "checkpoint": checkpoint,
        "reduce": reduce,
        "max_bytes": max_bytes,
        "progress": progress,
    }
    if fun is None:
        check_request(Request(_no_function, **options))
        return functools.partial(_mapped, options)
    return _mapped(options, fun)


def _no_function() -> None:
    """Stand in for the function until a decorator has it, so that everything else is checked at once."""


def _mapped(options: dict[str, Any], fun: Callable[..., Any]) -> Any:
    request = Request(fun, **options)
    check_request(request)

    def call(*args: Any, **kwargs: Any) -> Any:
        return request.call(*args, **kwargs)

    # A function rather than an object with `__call__`, so that it can be a method.
    mapped: Any = functools.update_wrapper(call, fun)
    mapped.batch_size_for = request.batch_size_for
    return mapped
