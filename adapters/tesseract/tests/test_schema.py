"""Every array of a Tesseract's inputs and outputs is found in its schema, differentiable or not."""

import numpy as np
import pytest
from batchrules_tesseract import TesseractClient, tesseract_schema
from batchrules_tesseract._document import Document, item_key

from batchrules import ArraySpec


@pytest.fixture
def schema_of(servers):
    def read(name):
        with TesseractClient(servers(name).url) as client:
            return tesseract_schema(client.openapi_schema)

    return read


def test_nested_fields(schema_of):
    vector, number = ArraySpec((None,), "float64"), ArraySpec((), "float64")
    schema = schema_of("nested")
    assert dict(schema.inputs) == {
        "body.v": vector,
        "body.s": number,
        "gain": number,
        "rate": ArraySpec((), "float64", differentiable=False),
        "parts.[]": ArraySpec((2,), "float64"),
        "loads.{}": number,
        "pair.[0]": ArraySpec((None,), "float32", differentiable=False),
        "count": ArraySpec((), "int64", differentiable=False),
        "spare.v": vector,
        "spare.s": number,
    }
    assert dict(schema.outputs) == {
        "out.v": vector,
        "out.total": number,
        "each.[]": ArraySpec((2,), "float64"),
        "count": ArraySpec((), "int64", differentiable=False),
    }


def test_arrays_of_any_shape(schema_of):
    schema = schema_of("recipe")
    assert schema.inputs["x"] == ArraySpec((...,), "float64")
    assert schema.inputs["offset"] == ArraySpec((...,), "float64", differentiable=False)
    assert schema.outputs["negative"] == ArraySpec((...,), "bool", differentiable=False)


def test_fixed_shapes(schema_of):
    assert schema_of("fixed").inputs["weights"] == ArraySpec((2, 3), "float32", differentiable=False)


@pytest.mark.parametrize("name", ["nested", "recipe", "fixed", "solver"])
def test_the_differentiable_ones_are_those_that_the_tesseract_lists(servers, name):
    with TesseractClient(servers(name).url) as client:
        openapi = client.openapi_schema
    schema = tesseract_schema(openapi)
    for arrays, key in ((schema.inputs, "ApplyInputSchema"), (schema.outputs, "ApplyOutputSchema")):
        listed = openapi["components"]["schemas"][key]["differentiable_arrays"]
        assert {path for path, spec in arrays.items() if spec.differentiable} == set(listed)
        for path, entry in listed.items():
            assert arrays[path].dtype == np.dtype(entry["dtype"])
            assert arrays[path].shape == tuple(entry.get("shape", (...,)))


def document(fields, **models):
    schemas = {"Apply_InputSchema": {"properties": fields}, "Apply_OutputSchema": {"properties": {}}, **models}
    return {"components": {"schemas": schemas}}


def array(shape=None, dtype=None):
    return {"array_flags": [], "properties": {"shape": shape or {}, "dtype": dtype or {}}}


def test_a_model_that_contains_itself():
    node = {"$ref": "#/components/schemas/Node"}
    model = {"properties": {"v": array(), "next": {"anyOf": [node, {"type": "null"}]}}}
    assert "root.v" in tesseract_schema(document({"root": node}, Node=model)).inputs


def test_an_array_of_any_dtype():
    every = {"examples": ["float64"], "enum": ["float32", "float64", "complex128"]}
    assert tesseract_schema(document({"x": array(dtype=every)})).inputs["x"].dtype is None


@pytest.mark.parametrize(
    ("item", "size"), [({"minimum": 0}, None), ({"enum": [1, 3]}, 3), ({"const": 1}, 1), ({"enum": [1]}, 1)]
)
def test_dimensions(item, size):
    assert tesseract_schema(document({"x": array({"prefixItems": [item]})})).inputs["x"].shape == (size,)


def test_an_unknown_field_may_hold_anything():
    step = Document(document({})).inputs.field("new")
    assert step.segment == "new"
    assert step.place.anything


def test_a_key_with_braces():
    assert item_key("a{b}\\") == "{a\\{b\\}\\\\}"
