"""A host function that fails where it is told to, and what its failures say."""

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from batchrules import host_call

F64 = jax.ShapeDtypeStruct((), "float64")
XS = np.arange(6.0)
VECTOR = np.ones(3)
VECTORISED = ("expand_dims", "broadcast_all", "legacy_vectorized")
METHODS = ("sequential", *VECTORISED)
WAYS = ("eager", "jit")
MESSAGE = "the reactor is empty"

# Its threads start when they are needed, and stay.
POOL = concurrent.futures.ThreadPoolExecutor(2)
DISPATCH: Mapping[str, Mapping[str, Any]] = {"in order": {}, "threads": {"executor": 3}, "pool": {"executor": POOL}}
on_every_dispatch = pytest.mark.parametrize("dispatch", DISPATCH.values(), ids=DISPATCH)


class ReactorError(Exception):
    """An error with more to it than its text."""

    def __init__(self, message: str = MESSAGE, level: int = 7) -> None:
        super().__init__(message)
        self.level = level


def fails_at(*bad: float) -> Callable[..., Any]:
    """Twice x times the sum of y, which fails for these x."""

    def solve(x: Any, y: Any) -> Any:
        if np.isin(x, bad).any():
            raise ReactorError
        return 2 * x * y.sum(-1)

    return solve


def near_two(x: Any, y: Any) -> Any:
    """Fails beside x = 2, where only a finite difference comes."""
    if np.any((x != 2) & (np.abs(x - 2) < 0.1)):
        raise ReactorError
    return x * y.sum(-1)


def always(error: Any) -> Callable[..., Any]:
    """A function that always raises this."""

    def fail(x: Any, *more: Any) -> Any:
        del x, more
        raise error

    return fail


def solver(*bad: float, **options: Any) -> Any:
    """The host call of it."""
    return host_call(fails_at(*bad), F64, name="solve", verify=False, **options)


def failing_endpoint(args: Any, *given: Any) -> Any:
    """Any of its endpoints; fails where x is 2."""
    x, y = args
    if np.any(x == 2):
        raise ReactorError
    if len(given) == 2:
        return given[0] * 2 * y.sum(-1), (2 * given[0] * x)[..., None] * VECTOR
    if isinstance(given[0][0], bool):
        return 2 * y.sum(-1), 2 * x[..., None] * VECTOR
    return 0 * x


def with_endpoint(endpoint: str, **options: Any) -> Any:
    """The host call with that endpoint alone; only the endpoint fails."""
    return solver(**{endpoint: failing_endpoint}, **options)


def nested(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call over all pairs."""
    return jax.vmap(jax.vmap(call, (None, 0)), (0, None))


def through(way: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a program of that kind, waited for."""
    program = jax.jit(function) if way == "jit" else function
    return lambda *args: jax.block_until_ready(program(*args))


def told(way: str, function: Callable[..., Any], *args: Any) -> str:
    """What a failing program tells: a note of the original, or the end of what JAX says."""
    with pytest.raises(jax.errors.JaxRuntimeError if way == "jit" else ReactorError) as info:
        through(way, function)(*args)
    if way == "jit":
        head, _, tail = str(info.value).rpartition("ForeignCallError: ")
        assert head, str(info.value)
        return tail
    (note,) = (note for note in info.value.__notes__ if "host_call" in note)
    return note
