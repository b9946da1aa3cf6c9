"""Every kind of field: nested models, lists, dicts, tuples, optional and union fields, defaults, static values."""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from calls import note
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float32, Float64, Int64
from tesseract_core.runtime.jax_recipes import jax_abstract_eval, jax_apply, jax_jvp, jax_vjp


class Body(BaseModel):
    v: Differentiable[Array[(None,), Float64]]
    s: Differentiable[Float64] = 1.0
    steps: int = 1


class InputSchema(BaseModel):
    body: Body
    gain: Differentiable[Float64] | None = None
    rate: float | Array[(), Float64] = 1.0
    parts: list[Differentiable[Array[(2,), Float64]]] = []
    loads: dict[str, Differentiable[Float64]] = {}
    pair: tuple[Array[(None,), Float32], int] | None = None
    mode: Literal["sum", "product"] = "sum"
    count: Int64 = 0
    spare: Body | None = None


class Numbers(BaseModel):
    v: Differentiable[Array[(None,), Float64]]
    total: Differentiable[Float64]


class OutputSchema(BaseModel):
    out: Numbers
    each: list[Differentiable[Array[(2,), Float64]]]
    steps: int
    note: str
    count: Int64


@eqx.filter_jit
def apply_jit(inputs: dict) -> dict:
    body, loads = inputs["body"], inputs["loads"]
    gain = 1.0 if inputs["gain"] is None else inputs["gain"]
    load = sum(loads.values(), start=jnp.zeros(()))
    v = body["v"] * body["s"] * gain * inputs["rate"] * body["steps"]
    if inputs["spare"] is not None:
        v = v + inputs["spare"]["v"] * inputs["spare"]["s"]
    total = v.sum() + load if inputs["mode"] == "sum" else v.sum() * load
    if inputs["pair"] is not None:
        total = total + jnp.asarray(inputs["pair"][0], "float64").sum() * inputs["pair"][1]
    return {
        "out": {"v": v, "total": total},
        "each": [part * v.sum() for part in inputs["parts"]],
        "count": jnp.asarray(inputs["count"]) + 1,
    }


def static_outputs(inputs: Any) -> dict[str, Any]:
    return {"steps": inputs.body.steps, "note": inputs.mode}


def apply(inputs: InputSchema) -> OutputSchema:
    note("apply", inputs.body.v)
    return OutputSchema(**jax_apply(apply_jit, inputs), **static_outputs(inputs))


def jacobian_vector_product(
    inputs: InputSchema, jvp_inputs: set[str], jvp_outputs: set[str], tangent_vector: dict[str, Any]
):
    note("jacobian_vector_product", inputs.body.v)
    return jax_jvp(apply_jit, inputs, jvp_inputs, jvp_outputs, tangent_vector)


def vector_jacobian_product(
    inputs: InputSchema, vjp_inputs: set[str], vjp_outputs: set[str], cotangent_vector: dict[str, Any]
):
    note("vector_jacobian_product", inputs.body.v)
    return jax_vjp(apply_jit, inputs, vjp_inputs, vjp_outputs, cotangent_vector)


def abstract_eval(abstract_inputs):
    note("abstract_eval")
    return {**jax_abstract_eval(apply_jit, abstract_inputs), **static_outputs(abstract_inputs)}
