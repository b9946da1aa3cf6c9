"""`ArraySpec`, `Schema` and signatures: what they take, how they compare, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrules import ArraySpec, Schema
from batchrules._schema import as_schema, as_signature

TAKEN = [
    ((), (), True),
    ((), (1,), False),
    ((3,), (3,), True),
    ((3,), (4,), False),
    ((3,), (2, 3), False),
    ((None,), (7,), True),
    ((None,), (), False),
    ((None, 3), (0, 3), True),
    ((None, 3), (3,), False),
    ((...,), (), True),
    ((...,), (1, 2, 3), True),
    ((..., 3), (3,), True),
    ((..., 3), (5, 4, 3), True),
    ((..., 3), (), False),
    ((..., 3), (3, 4), False),
    ((..., None, 3), (3,), False),
    ((..., None, 3), (9, 3), True),
    (..., (4, 5), True),
    ([2, None], (2, 5), True),
]


@pytest.mark.parametrize(("shape", "given_shape", "taken"), TAKEN, ids=str)
def test_which_shapes_are_taken(shape, given_shape, taken):
    assert ArraySpec(shape).takes(given_shape) is taken


sizes = st.integers(0, 5)


@given(st.lists(sizes | st.none(), max_size=3), st.lists(sizes, max_size=3), st.data())
def test_any_rank_takes_leading_dimensions(core, lead, data):
    exact = [data.draw(sizes) if dimension is None else dimension for dimension in core]
    assert ArraySpec(tuple(core)).takes(exact)
    assert ArraySpec((..., *core)).takes([*lead, *exact])
    assert ArraySpec(tuple(core)).takes([*lead, *exact]) == (not lead)


@pytest.mark.parametrize(
    ("shape", "any_rank", "text"),
    [
        ((), False, "()"),
        ((3,), False, "(3,)"),
        ((None, 3), False, "(*, 3)"),
        ((...,), True, "(...,)"),
        ((..., None), True, "(..., *)"),
    ],
)
def test_as_text(shape, any_rank, text):
    spec = ArraySpec(shape)
    assert str(spec) == text
    assert spec.any_rank is any_rank


def test_defaults_and_values():
    assert ArraySpec() == ArraySpec((...,), None, True)
    assert ArraySpec(..., "float32") == ArraySpec((...,), np.float32)
    assert ArraySpec((3,), "float32").dtype == np.dtype("float32")
    assert ArraySpec([3]) == ArraySpec((3,))
    assert hash(ArraySpec([3], "f4")) == hash(ArraySpec((3,), np.float32))
    assert ArraySpec((3,), differentiable=False) != ArraySpec((3,))
    assert ArraySpec((3,), "bfloat16" if "bfloat16" in np.sctypeDict else "float16").dtype.itemsize == 2


@pytest.mark.parametrize(
    ("shape", "error", "text"),
    [
        ("ab", TypeError, r"ArraySpec: shape must be a tuple of int, None or a leading `\.\.\.`; got 'ab'"),
        (3, TypeError, r"ArraySpec: shape must be a tuple .*; got 3"),
        (None, TypeError, r"ArraySpec: shape must be a tuple .*; got None"),
        ((2.0,), TypeError, r"ArraySpec: a dimension is an int, None or a leading `\.\.\.`; got 2\.0"),
        ((True,), TypeError, r"got True in \(True,\)"),
        (("n",), TypeError, r"got 'n'"),
        ((-1,), ValueError, r"ArraySpec: a dimension cannot be negative; got -1 in \(-1,\)"),
        ((3, ...), ValueError, r"ArraySpec: `\.\.\.` may only come first in a shape"),
        ((..., ...), ValueError, r"may only come first"),
    ],
)
def test_shapes_that_are_refused(shape, error, text):
    with pytest.raises(error, match=text):
        ArraySpec(shape)


def test_numpy_integers_are_dimensions():
    spec = ArraySpec((np.int64(3), None))
    assert spec.takes((3, 4))
    assert list(map(type, spec.shape)) == [int, type(None)]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(TypeError):
        ArraySpec((3,), "float31")


def test_schema_is_a_mapping():
    schema = Schema({"x": ArraySpec((3,)), "model.w": ArraySpec()})
    assert list(schema) == ["x", "model.w"]
    assert len(schema) == 2
    assert schema["model.w"] == ArraySpec()
    assert "y" not in schema
    assert schema.get("y") is None
    with pytest.raises(KeyError):
        schema["y"]
    assert repr(schema).startswith("Schema({'x': ArraySpec(")


def test_a_sequence_names_positions():
    assert Schema([ArraySpec(), ArraySpec((3,))]) == Schema({"args.0": ArraySpec(), "args.1": ArraySpec((3,))})


def test_schemas_compare_by_value():
    first = Schema({"x": ArraySpec((3,)), "y": ArraySpec()})
    second = Schema({"y": ArraySpec(), "x": ArraySpec([3])})
    assert first == second
    assert hash(first) == hash(second)
    assert first != Schema({"x": ArraySpec((3,))})
    assert first != Schema({"x": ArraySpec((3,)), "y": ArraySpec((3,))})
    assert first != {"x": ArraySpec((3,)), "y": ArraySpec()}


def test_a_schema_keeps_what_it_was_given():
    specs = {"x": ArraySpec()}
    schema = Schema(specs)
    specs["y"] = ArraySpec()
    assert list(schema) == ["x"]


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ({"x": (3,)}, r"Schema: 'x' needs an ArraySpec; got \(3,\) of type tuple"),
        ({3: ArraySpec()}, r"Schema: a path is a string such as 'x' or 'params\.w'; got 3"),
        ([ArraySpec(), "float32"], r"Schema: 'args\.1' needs an ArraySpec; got 'float32' of type str"),
    ],
)
def test_schemas_that_are_refused(specs, text):
    with pytest.raises(TypeError, match=text):
        Schema(specs)


def test_as_schema():
    schema = Schema([ArraySpec()])
    assert as_schema(None, "f") is None
    assert as_schema(schema, "f") is schema
    assert as_schema({"args.0": ArraySpec()}, "f") == schema
    assert as_schema((ArraySpec(),), "f") == schema
    for wrong in ("x", 3, ArraySpec()):
        with pytest.raises(
            TypeError, match=r"f: schema must be a Schema, a mapping from path to ArraySpec, or a sequence"
        ):
            as_schema(wrong, "f")


SIGNATURES = [
    ("()->()", ((),), ((),)),
    ("(i)->()", (("i",),), ((),)),
    ("(i,j),(j)->(i)", (("i", "j"), ("j",)), (("i",),)),
    (" ( i , j ) , ( j ) -> ( i ) , ( ) ", (("i", "j"), ("j",)), (("i",), ())),
    ("->(n)", (), (("n",),)),
    ("(3),(n1,m_2)->(m_2)", (("3",), ("n1", "m_2")), (("m_2",),)),
]


@pytest.mark.parametrize(("text", "inputs", "outputs"), SIGNATURES)
def test_signatures(text, inputs, outputs):
    signature = as_signature(text, "f")
    assert (signature.inputs, signature.outputs, signature.text) == (inputs, outputs, text)
    assert as_signature(signature, "f") is signature
    assert as_signature(text, "f") == signature


WRONG = (
    "", "i->i", "(i)", "(i)->", "(i)->(j", "(i),->(i)", "(i)(j)->()", "(i,)->()", "(i-j)->()", "(i)->(i)->(i)",
)  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_signatures_that_are_refused(text):
    with pytest.raises(ValueError, match=r"f: .* is not a gufunc signature\. Write the core dimensions"):
        as_signature(text, "f")


def test_a_signature_is_a_string():
    assert as_signature(None, "f") is None
    with pytest.raises(TypeError, match=r"f: signature must be a string such as '\(i,j\),\(j\)->\(i\)'; got 3"):
        as_signature(3, "f")
