"""A Tesseract made by the JAX recipe: every array takes any shape, every endpoint exists.

`WITHOUT` names endpoints to leave out, separated by commas.
"""

import os
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from calls import note
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float64
from tesseract_core.runtime.jax_recipes import jax_abstract_eval, jax_apply, jax_jacobian, jax_jvp, jax_vjp


class InputSchema(BaseModel):
    x: Differentiable[Array[..., Float64]]
    s: Differentiable[Array[..., Float64]]
    offset: Array[..., Float64] = 0.0


class OutputSchema(BaseModel):
    y: Differentiable[Array[..., Float64]]
    negative: Array[..., "bool"]


@eqx.filter_jit
def apply_jit(inputs: dict) -> dict:
    y = jnp.sin(inputs["x"]) * inputs["s"] + inputs["offset"]
    return {"y": y, "negative": y < 0}


def apply(inputs: InputSchema) -> OutputSchema:
    note("apply", inputs.x, inputs.s)
    return OutputSchema(**jax_apply(apply_jit, inputs))


def jacobian(inputs: InputSchema, jac_inputs: set[str], jac_outputs: set[str]):
    note("jacobian", inputs.x, inputs.s)
    return jax_jacobian(apply_jit, inputs, jac_inputs, jac_outputs)


def jacobian_vector_product(
    inputs: InputSchema, jvp_inputs: set[str], jvp_outputs: set[str], tangent_vector: dict[str, Any]
):
    note("jacobian_vector_product", inputs.x, inputs.s)
    return jax_jvp(apply_jit, inputs, jvp_inputs, jvp_outputs, tangent_vector)


def vector_jacobian_product(
    inputs: InputSchema, vjp_inputs: set[str], vjp_outputs: set[str], cotangent_vector: dict[str, Any]
):
    note("vector_jacobian_product", inputs.x, inputs.s)
    return jax_vjp(apply_jit, inputs, vjp_inputs, vjp_outputs, cotangent_vector)


def abstract_eval(abstract_inputs):
    note("abstract_eval")
    return jax_abstract_eval(apply_jit, abstract_inputs)


for _name in filter(None, os.environ.get("WITHOUT", "").split(",")):
    del globals()[_name]
