"""What a Tesseract's outputs will be: from its abstract_eval endpoint, from the user, or from its schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from batchrules import ArraySpec
from batchrules_tesseract._document import Document, Place, is_array
from batchrules_tesseract._errors import TesseractAnswerError
from batchrules_tesseract._form import Constant, Fields, Form, Items, Slot, fill
from batchrules_tesseract._inputs import Inputs


@dataclass(frozen=True)
class Outputs:
    """The outputs of one call.

    Attributes:
        form: Everything but the arrays.
        shapes: The shape and dtype of each array, by path; an `ArraySpec` for one that has no derivative.
        differentiable: The paths of the arrays that have derivatives.
        grows: Whether the schema lets every output take a leading dimension.
    """

    form: Form
    shapes: dict[str, Any]
    differentiable: tuple[str, ...]
    grows: bool


def from_abstract_eval(tesseract: Any, inputs: Inputs, document: Document) -> Outputs:
    """Ask the Tesseract's abstract_eval endpoint."""
    described = {path: {"shape": list(array.shape), "dtype": array.dtype.name} for path, array in inputs.arrays.items()}
    answer = tesseract.abstract_eval(fill(inputs.form, described))
    return _read(answer, document.outputs, _described)


def from_user(shapes: Any, inputs: Inputs, document: Document) -> Outputs:
    """Take what the user said: a tree of things with `.shape` and `.dtype`, or a function of the inputs."""
    if callable(shapes) and not hasattr(shapes, "shape"):
        like = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in inputs.arrays.items()}
        shapes = shapes(fill(inputs.form, like))
    if not isinstance(shapes, Mapping):
        raise TypeError(
            "result_shape must be a dict with the fields of the Tesseract's output schema, and "
            f"jax.ShapeDtypeStruct(shape, dtype) for each array in it, or a function that returns one; got {shapes!r}."
        )
    return _read(shapes, document.outputs, _with_shape)


def from_schema(document: Document, where: str) -> Outputs:
    """Take the schema's word, where it fixes every shape.

    Raises:
        ValueError: It does not.
    """
    return _read(_promised(document.outputs, "", where), document.outputs, _with_shape)


def _read(value: Any, place: Place, shape_of: Any) -> Outputs:
    reading = _Reading(shape_of)
    form = reading.form(value, "", place)
    shapes = {path: reading.shapes[path] for path in sorted(reading.shapes)}
    differentiable = tuple(path for path, shape in shapes.items() if not isinstance(shape, ArraySpec))
    return Outputs(form, shapes, differentiable, reading.grows())


@dataclass(frozen=True)
class _Reading:
    shape_of: Any
    shapes: dict[str, Any] = field(default_factory=dict)
    specs: dict[str, ArraySpec] = field(default_factory=dict)

    def grows(self) -> bool:
        return all(spec.any_rank for spec in self.specs.values())

    def form(self, value: Any, path: str, place: Place) -> Form:
        shape = self.shape_of(value)
        if shape is not None:
            spec = place.arrays[0] if place.arrays else ArraySpec(shape.shape, differentiable=False)
            self.specs[path] = spec
            self.shapes[path] = (
                shape if spec.differentiable else ArraySpec(shape.shape, shape.dtype, differentiable=False)
            )
            return Slot(path)
        if isinstance(value, Mapping):
            steps = [place.field(key) for key in value]
            children = (self._below(path, step, value[key]) for step, key in zip(steps, value, strict=True))
            return Fields(tuple(value), tuple(children))
        if isinstance(value, list | tuple):
            kind = list if isinstance(value, list) else tuple
            return Items(kind, tuple(self._below(path, place.item(i), child) for i, child in enumerate(value)))
        return Constant(path, value)

    def _below(self, path: str, step: Any, value: Any) -> Form:
        return self.form(value, f"{path}.{step.segment}" if path else step.segment, step.place)


def _described(value: Any) -> jax.ShapeDtypeStruct | None:
    if not (isinstance(value, Mapping) and {"shape", "dtype"} <= value.keys()):
        return None
    try:
        return jax.ShapeDtypeStruct(tuple(value["shape"]), np.dtype(value["dtype"]))
    except (TypeError, ValueError) as error:
        raise TesseractAnswerError(f"abstract_eval described an array as {value!r} ({error}).") from error


def _with_shape(value: Any) -> jax.ShapeDtypeStruct | None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return None
    return jax.ShapeDtypeStruct(tuple(value.shape), np.dtype(value.dtype))


def _promised(place: Place, path: str, where: str) -> Any:
    """The outputs as the schema fixes them, which it does for arrays of fixed shape inside models."""
    if len(place.nodes) == 1:
        node, spec = place.nodes[0], place.arrays[:1]
        if spec and spec[0].dtype is not None and all(isinstance(size, int) for size in spec[0].shape):
            return jax.ShapeDtypeStruct(spec[0].shape, spec[0].dtype)
        if not is_array(node) and node.get("properties"):
            keys = node["properties"]
            return {key: _promised(place.field(key).place, f"{path}.{key}".lstrip("."), where) for key in keys}
    raise ValueError(
        f"{where}: the Tesseract has no abstract_eval endpoint, and its schema does not fix the output {path!r} "
        f"({place.words}). Say what one call returns with result_shape=, a dict like the outputs with "
        "jax.ShapeDtypeStruct(shape, dtype) for each array."
    )
