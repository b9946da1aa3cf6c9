"""Primitives that are made for a test."""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla


def single(name, function):
    """A primitive with one result, whose types follow from its parameters."""
    primitive = Primitive(name)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))

    @primitive.def_abstract_eval
    def _(*avals, **params):
        structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        result = jax.eval_shape(functools.partial(function, **params), *structs)
        return jax.core.ShapedArray(result.shape, result.dtype)

    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive
