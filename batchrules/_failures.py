"""Failures of foreign code: what they say, and how the original exception is had back from a compiled program."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator
from typing import NoReturn

from batchrules._errors import (
    BatchContractError,
    BatchContractWarning,
    DispatchError,
    FailedElementsWarning,
    ForeignCallError,
    JaxInsideHostFunctionError,
    ReadOnlyArgumentError,
    ResultError,
)

_KEPT = 1024  # of all threads, since a program may fail in any
_MARK = ", with arguments "

# These name the function and what to do already. Warnings can be made errors.
OWN_ERRORS = (
    BatchContractError,
    BatchContractWarning,
    DispatchError,
    FailedElementsWarning,
    ForeignCallError,
    JaxInsideHostFunctionError,
    ReadOnlyArgumentError,
    ResultError,
)


class Watch:
    """The failures while it watches, each with the text that its compiled program ends with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: collections.deque[tuple[str, BaseException]] = collections.deque(maxlen=_KEPT)

    def add(self, text: str, error: BaseException) -> None:
        """Note a failure."""
        with self._lock:
            self._seen.append((text, error))

    def behind(self, text: str) -> tuple[str, BaseException] | None:
        """The failure that an error's text tells of: the newest of those that explain most of it."""
        with self._lock:
            told = [seen for seen in reversed(self._seen) if seen[0] in text]
        return max(told, key=lambda seen: len(seen[0]), default=None)


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
    if isinstance(error, ForeignCallError):
        raise error
    if isinstance(error, OWN_ERRORS):
        text = _printable(message_of(error))
        _failures.add(text, error)
        if compiled and text != str(error):
            raise ForeignCallError(text) from error
        raise error
    _failures.add(text, error)
    if compiled:
        # With the traceback, JAX's text shows the line of the user's function too.
        raise ForeignCallError(text).with_traceback(error.__traceback__) from error
    _note(error, text)
    raise error


def story(name: str, place: str, arguments: str, error: BaseException) -> str:
    """One line that says which call failed, where in the batch, on what, and why."""
    # What a host call inside this one said of it; the same exception may have been raised here before.
    inner = [note for note in getattr(error, "__notes__", ()) if _MARK in note and not note.startswith(name)]
    reason = inner[-1] if inner else f"{type(error).__name__}: {message_of(error)}".removesuffix(": ")
    return _printable(f"{name} failed{place}{_MARK}{arguments}: {reason}")


def message_of(error: BaseException) -> str:
    """An exception's text."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # __str__ is the user's code, and its failure must not hide the first one
        return "(its __str__ failed)"


def _printable(text: str) -> str:
    # XLA ends a text at NUL, and crashes on what is no UTF-8, such as a file name with a stray byte.
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _note(error: BaseException, text: str) -> None:
    notes = getattr(error, "__notes__", [])
    if text in notes:
        return
    # An exception object that is raised again and again must not gather the notes of all times.
    caller = text.partition(" failed")[0]
    notes[:] = [note for note in notes if not (_MARK in note and note.startswith(f"{caller} failed"))]
    # An exception of a frozen class cannot be given a note, and goes on without.
    with contextlib.suppress(AttributeError):
        error.add_note(text)


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
            found = watch.behind(str(error))
            if found is None or found[1] is error:
                raise
            text, original = found
            if not isinstance(original, OWN_ERRORS):
                _note(original, text)
            raise original from (original.__cause__ or error)
