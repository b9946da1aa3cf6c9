"""A solver in NumPy, elementwise in `x`, that takes `delay` seconds a call; no Jacobian endpoint.

`DTYPE` is the dtype of its arrays, float64 if it is not set.
"""

import os
import time
from typing import Any

import numpy as np
from calls import note
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, ShapeDType

DTYPE = os.environ.get("DTYPE", "float64")


class InputSchema(BaseModel):
    x: Differentiable[Array[..., DTYPE]]
    delay: float = 0.0


class OutputSchema(BaseModel):
    y: Differentiable[Array[..., DTYPE]]


def _work(endpoint: str, inputs: InputSchema) -> None:
    note(endpoint, inputs.x)
    if inputs.delay:
        time.sleep(inputs.delay)


def apply(inputs: InputSchema) -> OutputSchema:
    _work("apply", inputs)
    return OutputSchema(y=inputs.x**2 + 1.0)


def jacobian_vector_product(
    inputs: InputSchema, jvp_inputs: set[str], jvp_outputs: set[str], tangent_vector: dict[str, Any]
):
    _work("jacobian_vector_product", inputs)
    return {"y": 2.0 * np.asarray(inputs.x) * tangent_vector["x"]}


def vector_jacobian_product(
    inputs: InputSchema, vjp_inputs: set[str], vjp_outputs: set[str], cotangent_vector: dict[str, Any]
):
    _work("vector_jacobian_product", inputs)
    return {"x": 2.0 * np.asarray(inputs.x) * cotangent_vector["y"]}


def abstract_eval(abstract_inputs):
    note("abstract_eval")
    return {"y": ShapeDType(shape=abstract_inputs.x.shape, dtype=DTYPE)}
