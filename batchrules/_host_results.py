"""What a host function returned: arrays of the promised shapes and dtypes, or an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchrules._errors import BatchContractError, ReadOnlyArgumentError, ResultError
from batchrules._host_body import Primal
from batchrules._host_site import HostSite
from batchrules._recording import Result
from batchrules._values import number_as


def read_only_error(name: str, error: BaseException) -> ReadOnlyArgumentError | None:
    """A clearer error, if a function failed because it wrote into an argument."""
    # NumPy's own words, and without str(error), which is the user's code.
    words = [word for word in error.args if isinstance(word, str)] if isinstance(error, ValueError) else []
    if not any(word.endswith(("destination is read-only", "array is read-only")) for word in words):
        return None
    return ReadOnlyArgumentError(
        f"{name} writes into one of its arguments ({error}). Arguments belong to JAX and are read-only: "
        "take a copy first (x = x.copy()) and write into that."
    )


def as_array(site: HostSite, output: int, value: Any, where: str) -> np.ndarray[Any, Any]:
    """One output as a NumPy array of the promised dtype, or an error saying what is wrong with it."""
    promised = site.results[output]
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        return _python_scalar(site, promised, value, where)
    if isinstance(value, np.ma.MaskedArray):
        raise ResultError(
            f"{site.name}{where}: {_output(site, promised)} is a masked array, and JAX has no masks. Return "
            "result.filled(value), and the mask beside it if it matters."
        )
    array = np.asarray(value)
    if site.origin is not None and array.dtype.kind == "c" and promised.dtype.kind == "f":
        # JAX's convention: what a complex derivative gives for a real number is its real part.
        array = np.real(array)
    if array.dtype != promised.dtype:
        raise ResultError(
            f"{site.name}{where}: {_output(site, promised)} has dtype {array.dtype}, but {site.promise} "
            f"{promised.dtype}. Convert it in the function: result.astype({promised.dtype.name!r})."
        )
    return array


def _python_scalar(site: HostSite, promised: Result, value: Any, where: str) -> np.ndarray[Any, Any]:
    try:
        return number_as(value, promised.dtype)
    except ValueError as error:
        raise ResultError(
            f"{site.name}{where}: {_output(site, promised)} is {value!r}, but {site.promise} {promised.dtype}, and "
            f"{error}."
        ) from error


def check_element(site: HostSite, output: int, array: np.ndarray[Any, Any], where: str) -> None:
    """Raise unless an array has the shape that was promised for one element."""
    promised = site.results[output]
    if array.shape == promised.shape:
        return
    advice = "Return that shape." if site.origin else "Return that shape, or change result_shape."
    raise ResultError(
        f"{site.name}{where}: {_output(site, promised)} has shape {array.shape}, but {site.promise} "
        f"{promised.shape} for one element. {advice}"
    )


def check_batch(site: HostSite, output: int, array: np.ndarray[Any, Any], given: BatchGiven) -> None:
    """Raise unless an array is a batch of what was promised: leading with N, or with 1 where the method allows it."""
    promised = site.results[output]
    leads = (given.size, 1) if given.method == "expand_dims" else (given.size,)
    if array.ndim and array.shape[0] in leads and array.shape[1:] == promised.shape:
        return
    expected = " or ".join(str((lead, *promised.shape)) for lead in dict.fromkeys(leads))
    one = ", or with 1 if it depends on no mapped argument" if len(leads) > 1 else ""
    ways = "Make the function handle a leading dimension, or use method='sequential'."
    raise BatchContractError(
        f"{site.name} was given a batch of {given.size} elements at once (method {given.method!r}), with arguments "
        f"{described(site, given.shapes)}, and {_output(site, promised)} has shape {array.shape}: expected {expected}. "
        f"Every output must lead with the size of the batch{one}. {site.remedy('batch', ways)}"
    )


@dataclass(frozen=True)
class BatchGiven:
    """What a vectorised call was given, for messages."""

    method: str
    size: int
    shapes: tuple[tuple[int, ...], ...]


def described(site: HostSite, shapes: Sequence[tuple[int, ...]]) -> str:
    """The paths and shapes of a call's arguments."""
    paths = site.paths[site.masks :]
    return ", ".join(f"{path} {tuple(shape)}" for path, shape in zip(paths, shapes, strict=True)) or "none"


def _output(site: HostSite, promised: Result) -> str:
    if not isinstance(site.body, Primal):
        return f"the {promised.path}"
    return f"output {promised.path!r}" if promised.path else "the result"
