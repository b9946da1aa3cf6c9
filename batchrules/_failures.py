"""Failures of foreign code: what they say, and how the original exception is had back from a compiled program."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator
from typing import NoReturn

from batchrules._errors import (
    BatchContractError,
    DispatchError,
    ForeignCallError,
    JaxInsideHostFunctionError,
    ReadOnlyArgumentError,
    ResultError,
)

_KEPT = 32

# These name the function and what to do already.
OWN_ERRORS = (
    BatchContractError,
    DispatchError,
    ForeignCallError,
    JaxInsideHostFunctionError,
    ReadOnlyArgumentError,
    ResultError,
)


class Watch:
    """The failures while it watches, each with the text that its compiled program ends with."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[str, BaseException]] = collections.deque(maxlen=_KEPT)

    def add(self, text: str, error: BaseException) -> None:
        """Note a failure."""
        self._seen.append((text, error))

    def behind(self, text: str) -> BaseException | None:
        """The newest failure whose text is part of an error's text."""
        return next((error for own, error in reversed(self._seen) if own in text), None)


class _Failures:
    """The last failure of this process, and who watches for more. An exception keeps all that its frames hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: list[Watch] = []
        self.last: BaseException | None = None

    def add(self, text: str, error: BaseException) -> None:
        with self._lock:
            self.last = error
            for watch in self._watches:
                watch.add(text, error)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        watch = Watch()
        with self._lock:
            self._watches.append(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.remove(watch)


_failures = _Failures()


def surface(error: BaseException, text: str, *, compiled: bool) -> NoReturn:
    """Raise a failure of foreign code in the way that its surroundings need.

    Args:
        error: What the foreign code raised.
        text: The whole story; see `story`.
        compiled: Whether a compiled program made the call, of whose error JAX keeps nothing but the text.
    """
    if isinstance(error, OWN_ERRORS):
        _failures.add(str(error), error)
        raise error
    _failures.add(text, error)
    if compiled:
        raise ForeignCallError(text) from error
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)
    raise error


def story(name: str, place: str, arguments: str, error: BaseException) -> str:
    """One line that says which call failed, where in the batch, on what, and why."""
    message = f"{type(error).__name__}: {_message(error)}".removesuffix(": ")
    return f"{name} failed{place}, with arguments {arguments}: {message}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # __str__ is the user's code, and its failure must not hide the first one
        return "(its __str__ failed)"


def last_error() -> BaseException | None:
    """The exception that foreign code raised last in this process, as the foreign code raised it.

    A compiled program turns every exception into a `JaxRuntimeError` that has only its text; this is the object, with
    its type, attributes and traceback.

    Returns:
        The exception, or None if nothing failed yet.

    Example:
        >>> import jax, batchrules
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
        ... def fails(x):
        ...     raise LookupError("no such point")
        >>> try:
        ...     jax.block_until_ready(jax.jit(fails)(1.0))
        ... except Exception as error:
        ...     print("no such point" in str(error))
        True
        >>> batchrules.last_error()
        LookupError('no such point')
    """
    return _failures.last


@contextlib.contextmanager
def original_errors() -> Iterator[None]:
    """Inside, a compiled program that fails raises what the foreign code raised, KeyboardInterrupt included.

    JAX runs programs ahead: a result has to be waited for inside (`jax.block_until_ready`), or its failure may come
    later, outside.

    Example:
        >>> import jax, batchrules
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
        ... def fails(x):
        ...     raise LookupError("no such point")
        >>> try:
        ...     with batchrules.original_errors():
        ...         jax.block_until_ready(jax.jit(fails)(1.0))
        ... except LookupError as error:
        ...     print(error)
        no such point
    """
    with _failures.watched() as watch:
        try:
            yield
        except Exception as error:
            original = watch.behind(str(error))
            if original is None or original is error:
                raise
            raise original from error
