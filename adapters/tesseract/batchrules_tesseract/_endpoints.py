"""A Tesseract's endpoints as host functions for `batchrules.host_call`: dicts of arrays in, dicts of arrays out.

Each is a value: two of them for the same call of the same Tesseract are equal, and so are the programs made of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchrules_tesseract._errors import (
    TesseractAnswerError,
    TesseractBatchError,
    TesseractInputError,
    TesseractServerError,
)
from batchrules_tesseract._form import Fields, Form, Found, constants, fill, take

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Site:
    """One call of a Tesseract in a program.

    Attributes:
        tesseract: What has the endpoints as methods; they are looked up at each call.
        name: What messages call it.
        inputs: The inputs but for their arrays.
        ranks: The number of dimensions of each input array of one element, by path.
        outputs: The outputs but for their arrays.
        paths: The paths of the output arrays.
        differentiable: Those that have derivatives.
        check_static: Whether to warn of static outputs that differ from the promised ones.
    """

    tesseract: Any
    name: str
    inputs: Form
    ranks: tuple[tuple[str, int], ...]
    outputs: Form
    paths: tuple[str, ...]
    differentiable: tuple[str, ...]
    check_static: bool

    def call(self, endpoint: str, arrays: Arrays, **asked: Any) -> Any:
        """Call an endpoint with the inputs that these arrays make.

        Raises:
            TesseractBatchError: The Tesseract refused a batch in place of one element, or failed with it.
        """
        try:
            return getattr(self.tesseract, endpoint)(fill(self.inputs, arrays), **asked)
        except (ValueError, RuntimeError) as error:
            if self.batched(arrays) and _is_refusal(error):
                raise self._batch_error(endpoint, arrays, error) from error
            raise

    def _batch_error(self, endpoint: str, arrays: Arrays, error: Exception) -> TesseractBatchError:
        led = ", ".join(
            f"{path!r} {np.shape(arrays[path])}" for path, rank in self.ranks if np.ndim(arrays[path]) > rank
        )
        return TesseractBatchError(
            f"{self.name}, {endpoint}: a batch was sent (a leading dimension in {led}), and was refused or failed. "
            "If the Tesseract takes no batches, choose vmap_method='sequential', or let its schema and its code take "
            "arrays of any shape; if an element is bad, vmap_method='sequential' tells which. It said:\n"
            f"{error}"
        )

    def batched(self, arrays: Arrays) -> bool:
        """Whether these arrays are a batch, and not one element."""
        return any(np.ndim(arrays[path]) > rank for path, rank in self.ranks)

    def wrong(self, endpoint: str, reason: str) -> TesseractAnswerError:
        """An error for an answer that cannot be used."""
        return TesseractAnswerError(f"{self.name}, {endpoint}: {reason}.")


@dataclass(frozen=True)
class Apply:
    """The apply endpoint."""

    site: Site

    def __call__(self, inputs: Arrays) -> Arrays:
        """The output arrays, by path."""
        site = self.site
        answer = site.call("apply", inputs)
        found = Found(lambda form, value: site.wrong("apply", _other_form(form, value)))
        take(site.outputs, answer, found)
        if site.check_static and found.constants:
            _warn_of_drift(site, found.constants)
        return {path: _array(site, "apply", path, found.arrays[path]) for path in site.paths}


@dataclass(frozen=True)
class Jvp:
    """The jacobian_vector_product endpoint."""

    site: Site

    def __call__(self, args: tuple[Arrays], tangents: tuple[Mapping[str, Array | None]]) -> Arrays:
        """The tangents of the differentiable outputs, by path; None for the others."""
        site, endpoint = self.site, "jacobian_vector_product"
        given = {path: tangent for path, tangent in tangents[0].items() if tangent is not None}
        answer = site.call(
            endpoint, args[0], jvp_inputs=list(given), jvp_outputs=list(site.differentiable), tangent_vector=given
        )
        found = _entries(site, endpoint, answer, site.differentiable)
        return {path: found.get(path) for path in site.paths}  # type: ignore[misc]  # None: it has no tangent


@dataclass(frozen=True)
class Vjp:
    """The vector_jacobian_product endpoint."""

    site: Site

    def __call__(
        self, args: tuple[Arrays], cotangents: Mapping[str, Array | None], needed: tuple[Mapping[str, bool]]
    ) -> tuple[dict[str, Array | None]]:
        """The cotangents of the inputs, by path; None for those that are not needed."""
        site, endpoint = self.site, "vector_jacobian_product"
        given = {path: cotangents[path] for path in site.differentiable if cotangents[path] is not None}
        wanted = [path for path, is_needed in needed[0].items() if is_needed]
        answer = site.call(endpoint, args[0], vjp_inputs=wanted, vjp_outputs=list(given), cotangent_vector=given)
        found = _entries(site, endpoint, answer, wanted)
        return ({path: _like(found.get(path), args[0][path]) for path in args[0]},)


@dataclass(frozen=True)
class Jacobian:
    """The jacobian endpoint."""

    site: Site

    def __call__(self, args: tuple[Arrays], needed: tuple[Mapping[str, bool]]) -> dict[str, Any]:
        """For each output, the derivatives in the inputs, by path; None where there are none or none is needed."""
        site, inputs = self.site, args[0]
        wanted = [path for path, is_needed in needed[0].items() if is_needed]
        blocks = self._blocks(inputs, wanted)
        return {
            output: ({path: blocks[output].get(path) if output in blocks else None for path in inputs},)
            for output in site.paths
        }

    def _blocks(self, inputs: Arrays, wanted: list[str]) -> dict[str, dict[str, Array]]:
        if not self.site.batched(inputs):
            return self._ask(inputs, wanted)
        # A batch would be answered with the derivative of every row in every row: ask for each row alone.
        rows = [self._ask(row, wanted) for row in _rows(inputs, dict(self.site.ranks))]
        outputs = self.site.differentiable
        return {o: {i: np.stack([row[o][i] for row in rows]) for i in wanted} for o in outputs}

    def _ask(self, inputs: Arrays, wanted: list[str]) -> dict[str, dict[str, Array]]:
        site, endpoint = self.site, "jacobian"
        outputs = list(site.differentiable)
        answer = site.call(endpoint, inputs, jac_inputs=wanted, jac_outputs=outputs)
        if not isinstance(answer, Mapping) or set(answer) != set(outputs):
            raise site.wrong(endpoint, f"expected the outputs {outputs}; got {_keys(answer)}")
        return {output: _entries(site, endpoint, answer[output], wanted) for output in outputs}


@dataclass(frozen=True)
class NoJacobian:
    """Stands for the jacobian endpoint where it was insisted on, and the Tesseract has none."""

    site: Site

    def __call__(self, args: tuple[Arrays], needed: tuple[Mapping[str, bool]]) -> Any:
        """Say so."""
        del args, needed
        raise RuntimeError(
            f"{self.site.name}: materialize_jacobian=True, but the Tesseract has no jacobian endpoint. Leave "
            "materialize_jacobian out, and the endpoints it has are used."
        )


def _rows(inputs: Arrays, ranks: Mapping[str, int]) -> Iterable[dict[str, Array]]:
    leading = {path: array.ndim > ranks[path] for path, array in inputs.items()}
    size = max(array.shape[0] for path, array in inputs.items() if leading[path])
    for row in range(size):
        yield {
            # With an ellipsis, because an index alone would make a scalar of a number.
            path: array[row if array.shape[0] > 1 else 0, ...] if leading[path] else array
            for path, array in inputs.items()
        }


def _entries(site: Site, endpoint: str, answer: Any, expected: Iterable[str]) -> dict[str, Array]:
    if not isinstance(answer, Mapping) or set(answer) != set(expected):
        raise site.wrong(endpoint, f"expected the fields {sorted(expected)}; got {_keys(answer)}")
    return {path: _array(site, endpoint, path, answer[path]) for path in expected}


def _array(site: Site, endpoint: str, path: str, value: Any) -> Array:
    if value is None or isinstance(value, str | Mapping):
        raise site.wrong(endpoint, f"the field {path!r} should be an array, but is {_short(value)}")
    return np.asarray(value)


def _like(array: Array | None, argument: Array) -> Array | None:
    """A cotangent in the dtype of its argument: the Tesseract answers in the dtype of its schema."""
    if array is None or array.dtype == argument.dtype:
        return array
    real = array.real if array.dtype.kind == "c" and argument.dtype.kind != "c" else array
    return real.astype(argument.dtype)


def _is_refusal(error: Exception) -> bool:
    """Whether the Tesseract itself refused or failed: it answered, in words of its own."""
    if isinstance(error, TesseractInputError | TesseractServerError):
        return True
    # What `tesseract_core.Tesseract` raises: pydantic's error for an input, a plain RuntimeError for a failure.
    return type(error) is RuntimeError or type(error).__name__ == "ValidationError"


def _other_form(form: Form, value: Any) -> str:
    expected = f"a dict with the fields {list(form.keys)}" if isinstance(form, Fields) else "a list"
    return f"the outputs have another structure than was promised: expected {expected}, got {_keys(value)}"


def _keys(value: Any) -> str:
    return str(sorted(map(str, value))) if isinstance(value, Mapping) else _short(value)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:100]}{'...' if len(text) > 100 else ''} of type {type(value).__name__}"


def _warn_of_drift(site: Site, returned: Mapping[str, Any]) -> None:
    for promised in constants(site.outputs):
        if _differs(returned[promised.path], promised.value):
            warnings.warn(
                f"{site.name}: the static output {promised.path!r} is {returned[promised.path]!r}, but was "
                f"{promised.value!r} when the program was built, and that value was returned. If the difference does "
                "not matter, pass check_static_outputs=False.",
                UserWarning,
                stacklevel=2,
            )


def _differs(returned: Any, promised: Any) -> bool:
    try:
        return bool(returned != promised)
    except (TypeError, ValueError):
        # In process any object may come, and some (arrays) have no one answer to whether they are equal.
        return returned is not promised
