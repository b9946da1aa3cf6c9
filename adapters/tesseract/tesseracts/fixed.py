"""A Tesseract without an abstract_eval endpoint: the shapes of its outputs stand in its schema."""

import numpy as np
from calls import note
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float32, Float64


class InputSchema(BaseModel):
    x: Differentiable[Array[(3,), Float64]]
    weights: Array[(2, 3), Float32]


class OutputSchema(BaseModel):
    y: Differentiable[Array[(2,), Float64]]
    norm: Float64


def apply(inputs: InputSchema) -> OutputSchema:
    note("apply", inputs.x)
    y = np.asarray(inputs.weights, "float64") @ inputs.x
    return OutputSchema(y=y, norm=np.linalg.norm(y))
