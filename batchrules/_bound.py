"""Host and device calls as methods: made in a class by a decorator, and bound to an instance of it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from batchrules._methods import Choice


class BoundDeviceCall(functools.partial[Any]):
    """A device call whose first argument is given, static or a container of arrays."""

    def __init__(self, call: Any, instance: Any) -> None:
        del instance  # `partial` has taken both.
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(call, name, None))

    @property
    def __self__(self) -> Any:
        """The instance."""
        return self.args[0]

    @property
    def _call(self) -> Any:
        return self.func

    def method_for(self, *args: Any, in_axes: Any = 0, **kwargs: Any) -> Choice:
        """Tell which method `jax.vmap(self, in_axes)(*args)` would use, and why.

        Args:
            *args: Batched arguments, as `jax.vmap` would be given.
            in_axes: As for `jax.vmap`.
            **kwargs: Keyword arguments, mapped along axis 0, as `jax.vmap` does.

        Returns:
            A `Choice` with the name of the method and the reason in words.
        """
        each = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
        return self._call.method_for(self.__self__, *args, in_axes=(None, *each), **kwargs)

    def __repr__(self) -> str:
        """The name and the method."""
        return f"<bound {repr(self.func)[1:-1]}>"


class BoundHostCall(BoundDeviceCall):
    """A host call whose first argument is given, static or a container of arrays."""

    def where(self, mask: Any, /, *args: Any, otherwise: Any = None, **kwargs: Any) -> Any:
        """Call the method only where a mask is True; as `HostCall.where`."""
        return self._call.where(mask, self.__self__, *args, otherwise=otherwise, **kwargs)

    def replace(self, **options: Any) -> BoundHostCall:
        """The same method of the same instance with other options; as `HostCall.replace`."""
        return BoundHostCall(self._call.replace(**options), self.__self__)

    @property
    def host_function(self) -> Callable[..., Any]:
        """The Python function that is called on the host, bound to the instance."""
        return types.MethodType(self._call.host_function, self.__self__)
