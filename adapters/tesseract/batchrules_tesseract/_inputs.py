"""Dividing a Tesseract's inputs into arrays and static values, by what its schema says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from batchrules import ArraySpec
from batchrules_tesseract._document import Document, Place, Step
from batchrules_tesseract._encoding import DTYPES
from batchrules_tesseract._form import Constant, Fields, Form, Items, Slot

_NUMBERS = (bool, int, float, complex)


@dataclass(frozen=True)
class Inputs:
    """Inputs, divided.

    Attributes:
        form: Everything but the arrays.
        arrays: The arrays, by path.
        specs: What the schema says of each.
    """

    form: Form
    arrays: dict[str, Any]
    specs: dict[str, ArraySpec]


def divide(inputs: Any, document: Document) -> Inputs:
    """Divide inputs into arrays, which JAX may transform, and static values, which are part of the program.

    Raises:
        TypeError: Something that is no array where the schema has only arrays, or a traced array where it has none.
    """
    if not isinstance(inputs, Mapping) and not hasattr(inputs, "model_dump"):
        raise TypeError(
            f"inputs must be a dict with the fields of the Tesseract's input schema; got a {type(inputs).__name__}."
        )
    division = _Division()
    form = division.form(inputs, "", document.inputs)
    return Inputs(form, division.arrays, division.specs)


@dataclass(frozen=True)
class _Division:
    arrays: dict[str, Any] = field(default_factory=dict)
    specs: dict[str, ArraySpec] = field(default_factory=dict)

    def form(self, value: Any, path: str, place: Place) -> Form:
        if is_array_like(value):
            return self._array(value, path, place)
        if isinstance(value, _NUMBERS):
            return self._number(value, path, place)
        # Pydantic's models give their fields by iteration, arrays as they are.
        fields = dict(value) if hasattr(value, "model_dump") else value
        if isinstance(fields, Mapping):
            _check_no_array_belongs(value, path, place, container=_takes_fields(place))
            steps = [place.field(key) for key in fields]
            children = zip(steps, fields.values(), strict=True)
            return Fields(tuple(fields), tuple(self._below(path, step, child) for step, child in children))
        if isinstance(fields, list | tuple):
            _check_no_array_belongs(value, path, place, container=place.sequence)
            children = (self._below(path, place.item(i), child) for i, child in enumerate(fields))
            return Items(list if isinstance(fields, list) else tuple, tuple(children))
        if value is not None:
            _check_no_array_belongs(value, path, place, container=place.scalar)
        return Constant(path, value)

    def _below(self, path: str, step: Step, value: Any) -> Form:
        return self.form(value, f"{path}.{step.segment}" if path else step.segment, step.place)

    def _array(self, value: Any, path: str, place: Place) -> Form:
        if place.arrays or place.anything:
            return self._slot(value, path, place)
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"the input {path!r} is a traced value, {jax.typeof(value)}, but the Tesseract takes {place.words} "
                "there, which must be known when the program is built. Pass a Python value, for instance through "
                "static_argnums of jax.jit or by a closure; or declare the field as an array in the Tesseract."
            )
        if np.ndim(value) == 0:
            return Constant(path, value.item() if hasattr(value, "item") else np.asarray(value).item())
        raise TypeError(
            f"the input {path!r} is an array of shape {np.shape(value)}, but the Tesseract takes {place.words} there. "
            "Pass such a value, or declare the field as an array in the Tesseract."
        )

    def _number(self, value: Any, path: str, place: Place) -> Form:
        if place.scalar or not place.arrays:
            return Constant(path, value)
        return self._slot(_as_array(value, place.arrays[0].dtype), path, place)

    def _slot(self, value: Any, path: str, place: Place) -> Form:
        array = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
        if array.dtype.name not in DTYPES:
            raise TypeError(
                f"the input {path!r} has dtype {array.dtype}, which a Tesseract cannot take. Convert it to one of "
                f"{', '.join(sorted(DTYPES))}."
            )
        spec = _spec_for(array.shape, place)
        self.arrays[path] = _broadcast(array, spec)
        self.specs[path] = spec
        return Slot(path)


def is_array_like(value: Any) -> bool:
    """Whether a value is an array, or says how to make one of it."""
    return isinstance(value, jax.Array | np.ndarray | np.generic) or hasattr(value, "__array__")


def _as_array(value: Any, dtype: np.dtype[Any] | None) -> Any:
    natural = np.asarray(value)
    # A number that the schema's dtype cannot hold is for the Tesseract to refuse, not for us to round.
    fits = dtype is not None and np.can_cast(natural.dtype, dtype, "same_kind")
    return natural.astype(dtype) if fits else natural


def _spec_for(shape: tuple[int, ...], place: Place) -> ArraySpec:
    """The first of the arrays that the schema allows here which fits."""
    if not place.arrays:
        # The schema says nothing, so nothing proves that more dimensions are welcome.
        return ArraySpec(shape, differentiable=False)
    return next((spec for spec in place.arrays if _fits(shape, spec)), place.arrays[0])


def _fits(shape: tuple[int, ...], spec: ArraySpec) -> bool:
    if spec.any_rank:
        return True
    pairs = zip(shape, spec.shape, strict=False)
    return len(shape) == len(spec.shape) and all(got in {want, 1} or want is None for got, want in pairs)


def _broadcast(array: Any, spec: ArraySpec) -> Any:
    """A size of 1 where the schema has a fixed one is broadcast here, so that its derivative is summed."""
    if spec.any_rank or not _fits(array.shape, spec):
        return array
    shape = tuple(got if want is None else want for got, want in zip(array.shape, spec.shape, strict=True))
    return array if shape == array.shape else jnp.broadcast_to(array, shape)


def _takes_fields(place: Place) -> bool:
    return place.anything or any(node.get("type") == "object" and "array_flags" not in node for node in place.nodes)


def _check_no_array_belongs(value: Any, path: str, place: Place, *, container: bool) -> None:
    if not place.arrays or place.anything or container:
        return
    hint = f" Convert it first, for instance with jnp.array({path.rpartition('.')[2]})."
    raise TypeError(
        f"the input {path!r} must be an array, but is a {type(value).__name__}."
        f"{hint if isinstance(value, list | tuple) else ' Arrays of JAX and NumPy are taken, and numbers.'}"
    )
