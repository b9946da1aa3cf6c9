"""Pickle a function that a decorator has replaced in its module.

`pickle` sends a function as the name of its module and its own. After `@batchrules.host_call`, that name means the
`HostCall`, and `pickle` refuses: "it's not the same object".
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MAX_LAYERS = 100


class Portable:
    """Calls a function, and can be pickled where the function alone cannot."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"portable({self.function!r})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """By name if a decorator hides the function, else as the function itself is pickled."""
        place = _place(self.function)
        if place is None or place.depth == 0:
            return portable, (self.function,)
        cloudpickle = sys.modules.get("cloudpickle")
        if cloudpickle is not None and _goes_by_value(place.module, cloudpickle):
            # Made anew each time: the function may use a global that a notebook has changed since.
            return _loaded, (cloudpickle.dumps(self.function),)
        return _found, place


class _Place(NamedTuple):
    """Where a function is: behind how many decorators of the object with that name."""

    module: str
    qualname: str
    depth: int


def portable(function: Callable[..., Any]) -> Portable:
    """A callable that does what the function does, and that can be pickled though a decorator hides the function.

    Args:
        function: Any callable. One that no decorator hides is pickled as it always is.

    Example:
        >>> import pickle, math
        >>> pickle.loads(pickle.dumps(portable(math.sqrt)))(9.0)
        3.0
    """
    return function if isinstance(function, Portable) else Portable(function)


def _place(function: Callable[..., Any]) -> _Place | None:
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module not in sys.modules:
        return None
    try:
        visible = _attribute(module, qualname)
    except AttributeError:
        # Made inside a function, or renamed since.
        return None
    layers = enumerate(_layers(visible))
    return next((_Place(module, qualname, depth) for depth, layer in layers if layer is function), None)


def _layers(visible: Any) -> Iterator[Any]:
    """What a module shows under a name, and what is beneath each decorator of it."""
    for _ in range(MAX_LAYERS):
        yield visible
        visible = getattr(visible, "__wrapped__", None)
        if visible is None:
            return


def _attribute(module: str, qualname: str) -> Any:
    return functools.reduce(getattr, qualname.split("."), sys.modules[module])


def _goes_by_value(module: str, cloudpickle: Any) -> bool:
    # The executors that use cloudpickle have workers with another `__main__`, or with none of these modules.
    return module == "__main__" or module in cloudpickle.list_registry_pickle_by_value()


def _loaded(data: bytes) -> Portable:
    return portable(pickle.loads(data))  # noqa: S301  # part of a pickle itself


def _found(module: str, qualname: str, depth: int) -> Portable:
    importlib.import_module(module)
    function = next(itertools.islice(_layers(_attribute(module, qualname)), depth, None), None)
    if getattr(function, "__qualname__", None) != qualname or not callable(function):
        raise pickle.UnpicklingError(
            f"{module}.{qualname} is another function in this process than in the one that sent it: the decorators "
            "around it must be the same in both."
        )
    return portable(function)
