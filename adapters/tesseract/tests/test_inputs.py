"""Inputs of every kind reach the Tesseract, transformations go through them, and bad ones are refused at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchrules_tesseract import apply_tesseract
from twins import close

V = jnp.asarray([1.0, 2.0, 3.0])


@pytest.fixture(params=["url", "object", "in process"])
def tesseract(request, nested, local):
    from tesseract_core import Tesseract

    if request.param == "in process":
        return local("nested")
    return nested.url if request.param == "url" else Tesseract.from_url(nested.url, timeout=60.0)


def total(tesseract, **fields):
    return apply_tesseract(tesseract, {"body": {"v": V}, **fields})["out"]["total"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 6.0),
        ({"body": {"v": V, "s": 2.0}}, 12.0),
        ({"body": {"v": V, "s": jnp.asarray(2.0), "steps": 3}}, 36.0),
        ({"body": {"v": V, "s": np.float32(2.0), "steps": np.int64(3)}}, 36.0),
        ({"body": {"v": np.arange(3), "steps": jnp.asarray(2)}}, 6.0),
        ({"gain": None}, 6.0),
        ({"gain": 0.5}, 3.0),
        ({"gain": 2}, 12.0),
        ({"gain": jnp.asarray(0.5)}, 3.0),
        ({"rate": 2.0}, 12.0),
        ({"rate": jnp.asarray(2.0)}, 12.0),
        ({"loads": {"a": 1.0, "b.c": jnp.asarray(2.0), "d}": np.float64(3.0)}}, 12.0),
        ({"loads": {"a": 2.0}, "mode": "product"}, 12.0),
        ({"pair": (jnp.ones(2, "float32"), 3)}, 12.0),
        ({"pair": [np.ones(2), 3]}, 12.0),
        ({"spare": {"v": V}}, 12.0),
        ({"spare": None}, 6.0),
        ({"count": 5}, 6.0),
        ({"count": jnp.asarray(5)}, 6.0),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_kinds_of_fields(tesseract, fields, expected, jit):
    if jit:
        arrays, tree = jax.tree.flatten(fields, is_leaf=lambda x: x is None)
        jitted = [isinstance(a, jax.Array | np.ndarray) and a.ndim > 0 for a in arrays]

        @jax.jit
        def run(given):
            inside = iter(given)
            return total(
                tesseract,
                **jax.tree.unflatten(tree, [next(inside) if j else a for a, j in zip(arrays, jitted, strict=True)]),
            )

        assert run([a for a, j in zip(arrays, jitted, strict=True) if j]) == expected
    else:
        assert total(tesseract, **fields) == expected


def test_every_output(tesseract):
    inputs = {"body": {"v": V}, "parts": [jnp.ones(2), jnp.zeros(2)], "count": 2}
    got = apply_tesseract(tesseract, inputs)
    assert (got.pop("steps"), got.pop("note")) == (1, "sum")
    arrays = {"out": {"v": V, "total": jnp.asarray(6.0)}, "each": [jnp.full(2, 6.0), jnp.zeros(2)]}
    close(got, {**arrays, "count": jnp.asarray(3)})


def twin(v, s, load, part, gain):
    scaled = v * s * gain
    return {"v": scaled, "total": scaled.sum() + load}, part * scaled.sum()


ARGUMENTS = (V, jnp.asarray(2.0), jnp.asarray(3.0), jnp.asarray([1.0, -1.0]), jnp.asarray(0.5))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f(*ARGUMENTS),
        lambda f: jax.jacrev(f, tuple(range(5)))(*ARGUMENTS),
        lambda f: jax.jacfwd(f, tuple(range(5)))(*ARGUMENTS),
        lambda f: jax.vmap(f, (None, 0, None, None, 0))(*ARGUMENTS[:1], jnp.ones(3), *ARGUMENTS[2:4], jnp.arange(3.0)),
        lambda f: jax.vmap(jax.grad(lambda *a: f(*a)[0]["total"], (0, 1, 4)), (0, None, 0, None, None))(
            jnp.ones((2, 3)), ARGUMENTS[1], jnp.ones(2), *ARGUMENTS[3:]
        ),
    ],
    ids=["call", "jacrev", "jacfwd", "vmap", "vmap grad"],
)
def test_derivatives_go_through_nested_fields(tesseract, transform):
    def f(v, s, load, part, gain):
        inputs = {"body": {"v": v, "s": s}, "loads": {"x.y": load}, "parts": [part], "gain": gain}
        got = apply_tesseract(tesseract, inputs, vmap_method="auto")
        return got["out"], got["each"][0]

    close(transform(f), transform(twin))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"body": {"v": [1.0, 2.0]}}, r"'body\.v'.*list.*jnp\.array\(v\)"),
        ({"body": {"v": (1.0, 2.0)}}, r"'body\.v'.*tuple"),
        ({"body": {"v": "abc"}}, r"'body\.v'.*str"),
        ({"body": {"v": {"a": 1}}}, r"'body\.v'.*dict"),
        ({"parts": [[1.0, 2.0]]}, r"'parts\.\[0\]'.*list"),
        ({"loads": {"k": [1.0]}}, r"'loads\.\{k\}'.*list"),
        ({"body": {"v": V, "steps": V}}, r"'body\.steps'.*shape \(3,\).*an int"),
        ({"body": {"v": V.astype("bfloat16")}}, r"'body\.v'.*bfloat16"),
    ],
)
def test_a_bad_input_is_refused_before_anything_is_sent(nested, fields, text):
    with pytest.raises(TypeError, match=text):
        total(nested.url, **fields)
    assert not nested.lines()


def test_a_traced_value_for_a_field_that_is_no_array(nested):
    with pytest.raises(TypeError, match=r"'body\.steps' is a traced value.*an int.*static_argnums"):
        jax.jit(lambda n: total(nested.url, body={"v": V, "steps": n}))(2)


@pytest.mark.parametrize("inputs", [None, [1.0], V, "x"])
def test_inputs_that_are_no_dict(nested, inputs):
    with pytest.raises(TypeError, match="inputs must be a dict"):
        apply_tesseract(nested.url, inputs)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"body": {"v": jnp.ones((2, 2))}}, r"body\.v"),
        ({"body": {}}, r"body\.v"),
        ({"mode": "mean"}, "mode"),
        ({"colour": 3}, "colour"),
        ({"count": 2.5}, "count"),
    ],
)
def test_an_input_that_does_not_fit_the_schema(nested, fields, text):
    with pytest.raises(ValueError, match=text):
        total(nested.url, **fields)


@pytest.mark.parametrize("given", [None, 3, object(), []])
def test_something_that_is_no_tesseract(given):
    with pytest.raises(TypeError, match="Tesseract"):
        apply_tesseract(given, {})


def test_a_size_of_one_is_broadcast_and_its_derivative_summed(fixed):
    weights = jnp.arange(6.0, dtype="float32").reshape(2, 3)
    got = apply_tesseract(fixed.url, {"x": jnp.ones(1), "weights": weights})["y"]
    np.testing.assert_array_equal(got, np.asarray(weights).sum(1))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8", "bool"])
def test_dtypes_that_the_schema_can_cast(recipe, dtype):
    x = jnp.asarray([1, 0, 1]).astype(dtype)

    def f(x, s):
        return apply_tesseract(recipe.url, {"x": x, "s": s})["y"]

    close(f(x, V), jnp.sin(x.astype("float64")) * V)
    if jnp.issubdtype(dtype, jnp.floating):
        close(jax.grad(lambda x: f(x, V).sum())(x), (jnp.cos(x.astype("float64")) * V).astype(dtype))
        close(jax.jacrev(f)(x, V), jnp.diag(jnp.cos(x.astype("float64")) * V).astype(dtype))


def test_pydantic_models_are_inputs(nested):
    from pydantic import BaseModel

    class Body(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        v: jax.Array

    assert total(nested.url, body=Body(v=V)) == 6.0
