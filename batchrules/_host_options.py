"""The options of `host_call`, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules._dispatch import Dispatch
from batchrules._host_body import Endpoint, Endpoints
from batchrules._host_context import FirstCall
from batchrules._host_site import REMEDIES, Conduct, Remedies
from batchrules._recording import Result
from batchrules._schema import Schema, Signature
from batchrules._signature import Call
from batchrules._values import hashable


@dataclass(frozen=True)
class HostOptions:
    """The options of a host call."""

    method: str | None
    schema: Schema | None
    batch_size: int | None
    signature: Signature | None
    endpoints: Endpoints
    conduct: Conduct
    remedies: Remedies
    name: str


def conduct_of(dispatch: Dispatch, verify: Any, on_error: Any, flags: dict[str, Any], where: str) -> Conduct:
    """How calls are made, from what the user said."""
    verify = verify.item() if isinstance(verify, np.generic) else verify
    if not isinstance(verify, bool | float | int):
        raise TypeError(f"{where}: verify must be True, False, or a relative tolerance; got {verify!r}.")
    if not isinstance(verify, bool) and not 0 < verify < 1:
        raise ValueError(
            f"{where}: verify is True (the default tolerance), False (no check), or a relative tolerance between 0 and "
            f"1; got {verify!r}."
        )
    if on_error not in ("raise", "nan"):
        raise ValueError(f"{where}: on_error must be 'raise' or 'nan'; got {on_error!r}.")
    if flags["allow_jax"] and dispatch.executor is not None:
        raise ValueError(
            f"{where}: allow_jax=True and executor={dispatch.executor!r} exclude each other. A function that uses "
            "JAX is called in order, in the thread that JAX waits for: in others it could deadlock. Leave one out."
        )
    return Conduct(dispatch, verify, on_error, **flags)


def endpoints_of(functions: dict[str, Any], options: dict[str, bool], where: str) -> Endpoints:
    """The derivative endpoints; one that is a host call brings its own."""
    given = {
        name: None if function is None else _endpoint(function, f"{where}: the {name} endpoint", options["allow_jax"])
        for name, function in functions.items()
    }
    endpoints = Endpoints(**given, pass_outputs=options["pass_outputs"])
    for name, endpoint in given.items():
        if options["pass_outputs"] and endpoint is not None and endpoint.endpoints.pass_outputs:
            raise ValueError(
                f"{where}: pass_outputs=True, and so has the {name} endpoint, whose own endpoints could then be given "
                "either outputs. Leave it out of the endpoint: its endpoints get the outputs of the call."
            )
    return endpoints


def _endpoint(function: Callable[..., Any], where: str, allow_jax: bool) -> Endpoint:  # noqa: FBT001  # passed on
    as_endpoint = getattr(function, "as_endpoint", None)
    if as_endpoint is not None:
        return as_endpoint()
    return Endpoint(hashable(function), FirstCall(function, where, allow_jax=allow_jax), Endpoints())


def checked_remedies(remedies: Any, where: str) -> Remedies:
    """What a wrapping library tells its users to do, in a form that compares by value."""
    if remedies is None:
        return ()
    known = ", ".join(repr(name) for name in REMEDIES)
    if not isinstance(remedies, Mapping):
        raise TypeError(
            f"{where}: remedies must be a mapping from {known} to sentences, or None; got {remedies!r} of type "
            f"{type(remedies).__name__}."
        )
    for name, text in remedies.items():
        if name not in REMEDIES:
            raise ValueError(f"{where}: remedies has the unknown key {name!r}. The keys are {known}.")
        if not isinstance(text, str):
            raise TypeError(
                f"{where}: remedies[{name!r}] must be a string that says what to do; got {text!r} of type "
                f"{type(text).__name__}."
            )
    return tuple(sorted(remedies.items()))


def check_keywords(endpoints: Endpoints, call: Call, where: str) -> None:
    """Raise if arrays are passed by keyword, where endpoints would not see them."""
    if endpoints.given and call.structure.has_keyword_arrays:
        raise TypeError(
            f"{where}: with a jvp, vjp or jacobian endpoint, arrays must be positional parameters, since endpoints are "
            "given a tuple of them; pass them by position, or name them in static_argnames."
        )


def check_nan(on_error: str, results: tuple[Result, ...], where: str) -> None:
    """Raise if an output cannot be NaN where a failed element is to become that."""
    if on_error != "nan":
        return
    for position, result in enumerate(results):
        if not jnp.issubdtype(result.dtype, np.inexact):
            raise ValueError(
                f"{where}: on_error='nan', but output {result.path or position!r} has dtype {result.dtype}, which has "
                "no NaN. Return it as a floating-point number, or use on_error='raise'."
            )
