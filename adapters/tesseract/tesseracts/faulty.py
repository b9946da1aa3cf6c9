"""A Tesseract that fails, hangs, or kills its own worker for chosen values of `x`."""

import os
import time

from calls import note
from pydantic import BaseModel
from tesseract_core.runtime import Differentiable, Float64, ShapeDType

FAILS, HANGS, KILLS = -1.0, -2.0, -3.0


class InputSchema(BaseModel):
    x: Differentiable[Float64]
    level: int = 0


class OutputSchema(BaseModel):
    y: Differentiable[Float64]


def apply(inputs: InputSchema) -> OutputSchema:
    note("apply")
    if inputs.x == FAILS:
        raise RuntimeError("the solver did not converge")
    if inputs.x == HANGS:
        time.sleep(30)
    if inputs.x == KILLS:
        os._exit(1)
    return OutputSchema(y=inputs.x * 2.0)


def abstract_eval(abstract_inputs):
    note("abstract_eval")
    return {"y": ShapeDType(shape=(), dtype="float64")}
