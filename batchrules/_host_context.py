"""What surrounds foreign code while it runs: knowing that it does, and the guard of its first call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from batchrules._errors import JaxInsideHostFunctionError
from batchrules._portable import portable


class _Running(threading.local):
    numpy_only = False


running = _Running()


def inside_numpy_only() -> bool:
    """Whether this thread is inside a host function that must not use JAX."""
    return running.numpy_only


def run_inside(work: Callable[..., Any], *args: Any, allow_jax: bool) -> Any:
    """Do the work of a host function; a host call made by it meanwhile runs without JAX, unless it may use JAX."""
    before, running.numpy_only = running.numpy_only, not allow_jax
    try:
        return work(*args)
    finally:
        running.numpy_only = before


class HostTask:
    """The work of a host function on one element or chunk, in whatever thread or process it is done.

    Args:
        body: What is done.
        waits: Whether the result waits until others are done, in buffers that the function may use again for them.
    """

    __slots__ = ("_body", "_waits")

    def __init__(self, body: Callable[[Sequence[Any]], Any], *, waits: bool) -> None:
        self._body = body
        self._waits = waits

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Do it."""
        values = run_inside(self._body, leaves, allow_jax=False)
        if not self._waits:
            return values
        return [value.copy() if isinstance(value, np.ndarray) else value for value in values]


class BareTask:
    """The work of a function from arrays to one array, in a thread of this process, whose result waits for others."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Do it."""
        # What run_inside does, without a call more.
        before, running.numpy_only = running.numpy_only, True
        try:
            value = self._function(*leaves)
        finally:
            running.numpy_only = before
        return value.copy() if isinstance(value, np.ndarray) else value


class FirstCall:
    """Runs a host function, and until it has returned once, in a way that shows whether it uses JAX.

    JAX inside a host function can wait for a device that is itself waiting for the host function, for good. Every
    use of JAX on NumPy arrays moves data to a device, so a guard against transfers shows it. The guard costs
    microseconds, which is why only the first call pays for it.
    """

    def __init__(self, function: Callable[..., Any], name: str, *, allow_jax: bool) -> None:
        self._function = function
        self._name = name
        self._passed = allow_jax

    def __reduce__(self) -> tuple[Any, ...]:
        # JAX in another process waits for nothing in this one.
        return passed_first_call, (portable(self._function), self._name)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function."""
        if self._passed:
            return self._function(*args, **kwargs)
        return self._guarded(args, kwargs)

    def unguarded(self) -> Callable[..., Any] | None:
        """The bare function once it has passed, None before."""
        return self._function if self._passed else None

    def _guarded(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            result = self._within_guard(args, kwargs)
        except jax.errors.JaxRuntimeError as error:
            if "isallowed" not in str(error):
                raise
            raise JaxInsideHostFunctionError(
                f"{self._name} uses JAX inside. A host function runs while a JAX program waits for it, so JAX in it "
                "can deadlock. Write it with NumPy; or, if it is traceable by JAX, decorate it with device_call; or "
                "pass allow_jax=True and take care that it never waits for the program that called it."
            ) from error
        self._passed = True
        return result

    def _within_guard(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result, failure = None, None
        with jax.transfer_guard("disallow_explicit"):
            try:
                result = self._function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  # raised below: the guard cannot pass on frozen exceptions
                failure = error
        if failure is None:
            return result
        try:
            raise failure
        finally:
            del failure  # whose traceback holds this frame


def passed_first_call(function: Callable[..., Any], name: str) -> FirstCall:
    """A function without the guard."""
    return FirstCall(function, name, allow_jax=True)
