"""`batch_size="auto"`: the largest chunk whose compiled program fits the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from batchrules._bmap_sharding import is_placed_explicitly

# Each try compiles the program. The first two tell how memory grows with the chunk; then a guess is rarely far off.
MAX_TRIES = 8


def compiled_bytes(program: Callable[..., Any], *arguments: Any) -> int:
    """What the compiled program takes on one device: the arguments, the results and all between."""
    analysis = jax.jit(program).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise ValueError(
            'bmap: batch_size="auto" needs a compiler that tells what memory a program takes; give a number.'
        )
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int(total - analysis.alias_size_in_bytes)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The type of an array, and where it lies, if that is known."""
    kind = jax.typeof(x)
    sharding = None
    if isinstance(x, Tracer):
        sharding = kind.sharding if is_placed_explicitly(x) else None
    elif isinstance(x, jax.Array):
        sharding = x.sharding
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding)


def available_bytes(arguments: Sequence[Any]) -> int:
    """What the device that has least of it says that it has. The arguments are there, if they are anywhere."""
    places = (x.devices() for x in arguments if isinstance(x, jax.Array) and not isinstance(x, Tracer))
    devices = set().union(*places) & set(jax.local_devices()) or {jax.local_devices()[0]}
    limits = {device: (device.memory_stats() or {}).get("bytes_limit") for device in devices}
    unknown = [device for device, limit in limits.items() if limit is None]
    if unknown:
        raise ValueError(
            f'bmap: batch_size="auto" needs max_bytes=..., because {unknown[0]} does not tell how much memory it has.'
        )
    return min(int(limit) for limit in limits.values() if limit is not None)


def largest_batch_size(bytes_for: Callable[[int], int], size: int, limit: int) -> int:
    """The largest batch size, of 1 to `size`, for which `bytes_for` it is at most `limit`.

    Memory is taken to grow about linearly. Each guess is compiled before it is believed.
    """
    tried = {size: bytes_for(size)}
    if tried[size] <= limit:
        return size
    fits, too_large = 0, size
    guess = max(1, size // 64)
    for tries_left in reversed(range(MAX_TRIES)):
        tried[guess] = bytes_for(guess)
        fits, too_large = (guess, too_large) if tried[guess] <= limit else (fits, guess)
        if too_large - fits <= max(1, fits // 32):
            break
        # The last try is for one element, if nothing was small enough before.
        guess = _between(fits, too_large, _fitted(tried, limit)) if fits or tries_left > 1 else 1
    if fits == 0:
        raise ValueError(
            f"bmap: no batch size fits max_bytes={limit}: with {min(tried)} element(s) at a time the compiled program "
            f"takes {tried[min(tried)]} bytes, arguments and results included. Raise max_bytes, or reduce the outputs "
            "(reduce=...)."
        )
    return fits


def _fitted(tried: dict[int, int], limit: int) -> int:
    """Where a line through the two tries next to the limit meets it."""
    below = [b for b in tried if tried[b] <= limit]
    above = sorted(b for b in tried if tried[b] > limit)
    first, second = (max(below), above[0]) if below else (above[0], above[1])
    slope = (tried[second] - tried[first]) / (second - first)
    return int(first + (limit - tried[first]) / slope) if slope > 0 else 0


def _between(fits: int, too_large: int, guess: int) -> int:
    return min(max(guess, fits + 1), too_large - 1)
