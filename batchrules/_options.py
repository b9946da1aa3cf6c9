"""Checks of the options that host and device calls have in common."""

from __future__ import annotations

from typing import Any


def checked_bool(value: Any, option: str, where: str) -> bool:
    """The option, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {option} must be True or False; got {value!r}.")
    return value


def checked_endpoints(jvp: Any, vjp: Any, jacobian: Any, where: str) -> dict[str, Any]:
    """The endpoints by name, if they are functions or None."""
    endpoints = {"jvp": jvp, "vjp": vjp, "jacobian": jacobian}
    for name, endpoint in endpoints.items():
        if endpoint is not None and not callable(endpoint):
            raise TypeError(f"{where}: {name} must be a function or None; got {endpoint!r}.")
    return endpoints
