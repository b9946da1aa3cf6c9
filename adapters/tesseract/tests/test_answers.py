"""An answer is checked before it is used: whatever is wrong with it is an error that names the field."""

import base64
import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchrules_tesseract import TesseractAnswerError, TesseractClient, TesseractError, apply_tesseract
from fake import GOOD

from batchrules import ResultError


def answered(fake, **changes):
    fake.answers["/apply"] = {"y": {**GOOD, **changes}}
    with TesseractClient(fake.url) as client:
        return client.apply({})


def test_a_good_answer(fake):
    np.testing.assert_array_equal(answered(fake)["y"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shape": [3]}, "16 bytes.*need 24"),
        ({"shape": [1]}, "16 bytes.*need 8"),
        ({"shape": [-2]}, r"the shape \[-2\]; expected a list of whole numbers from 0"),
        ({"shape": [-1, -2]}, r"the shape \[-1, -2\]; expected a list of whole numbers from 0"),
        ({"shape": [2.0]}, r"the shape \[2.0\]; expected a list of whole numbers from 0"),
        ({"shape": [True, 2]}, r"the shape \[True, 2\]; expected a list of whole numbers from 0"),
        ({"shape": None}, "the shape None; expected a list of whole numbers from 0"),
        ({"shape": [10**15]}, "need"),
        ({"dtype": "float32"}, "16 bytes.*need 8"),
        ({"dtype": "object"}, "dtype 'object'"),
        ({"dtype": "O"}, "dtype 'O'"),
        ({"dtype": None}, "dtype None"),
        ({"data": None}, "no data"),
        ({"data": {"buffer": "%%%", "encoding": "base64"}}, "base64"),
        ({"data": {"buffer": [1.0, 2.0], "encoding": "base64"}}, "expected a string"),
        ({"data": {"buffer": "a.bin:0", "encoding": "binref"}}, "not asked for"),
        ({"data": {"buffer": "x", "encoding": "pickle"}}, "not asked for"),
        ({"data": {"buffer": "x", "encoding": "base64", "compression": "lz4"}}, "compressed"),
        ({"data": {"buffer": [[1.0], [2.0]], "encoding": "json"}}, r"\(2, 1\)"),
        ({"data": {"buffer": ["a", "b"], "encoding": "json"}}, "numbers"),
        ({"data": {"buffer": [[1.0], 2.0], "encoding": "json"}}, "numbers"),
    ],
)
def test_a_wrong_array(fake, changes, text):
    with pytest.raises(TesseractAnswerError, match=text) as caught:
        answered(fake, **changes)
    assert "'y'" in str(caught.value)
    assert fake.url in str(caught.value)


def test_a_wrong_array_far_inside(fake):
    fake.answers["/apply"] = {"a": [{"b": {**GOOD, "shape": [5]}}]}
    with TesseractClient(fake.url) as client, pytest.raises(TesseractAnswerError, match=r"'a\.\[0\]\.b'"):
        client.apply({})


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"\xff"])
def test_no_json(fake, body):
    fake.answers["/apply"] = body
    with TesseractClient(fake.url) as client, pytest.raises(TesseractAnswerError, match="not JSON"):
        client.apply({})


class Shared:
    """A fake Tesseract that answers with references into a shared folder."""

    def __init__(self, fake, folder):
        self.fake = fake
        self.outputs = folder / "out"
        self.outputs.mkdir()
        (self.outputs / "good.bin").write_bytes(np.array([1.0, 2.0]).tobytes())
        (folder / "secret.bin").write_bytes(bytes(16))

    def read(self, reference):
        self.fake.answers["/apply"] = {"y": {**GOOD, "data": {"buffer": reference, "encoding": "binref"}}}
        options = {"encoding": "binref", "input_folder": self.outputs, "output_folder": self.outputs}
        with TesseractClient(self.fake.url, **options) as client:
            return client.apply({})["y"]


@pytest.fixture
def shared(fake, tmp_path):
    return Shared(fake, tmp_path)


@pytest.mark.parametrize("reference", ["good.bin", "good.bin:0", "./good.bin:0"])
def test_a_reference_into_the_folder(shared, reference):
    np.testing.assert_array_equal(shared.read(reference), [1.0, 2.0])


def test_a_folder_behind_a_link(shared):
    link = shared.outputs.with_name("link")
    link.symlink_to(shared.outputs)
    shared.outputs = link
    np.testing.assert_array_equal(shared.read("good.bin:0"), [1.0, 2.0])


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("../secret.bin:0", "outside"),
        ("/etc/passwd:0", "outside"),
        ("link.bin:0", "outside"),
        ("missing.bin:0", "no file"),
        (".:0", "no file"),
        ("good.bin:8", "8 bytes.*need 16"),
        ("good.bin:999", "0 bytes.*need 16"),
        ("", "expected '<path>:<offset>'"),
    ],
)
def test_a_wrong_reference(shared, reference, text):
    (shared.outputs / "link.bin").symlink_to(shared.outputs.parent / "secret.bin")
    with pytest.raises(TesseractAnswerError, match=text):
        shared.read(reference)
    assert (shared.outputs.parent / "secret.bin").exists()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"y": {**GOOD, "shape": [1, 2]}}, "y"),
        ({"y": {**GOOD, "dtype": "int64"}}, "y"),
        ({"y": None}, "'y'"),
        ({"y": "two"}, "apply: the field 'y' should be an array, but is 'two' of type str"),
        ({"y": {"a": 1}}, "apply: the field 'y' should be an array, but is {'a': 1} of type dict"),
        ({"y": 1.5, "z": 1}, "structure"),
        ({}, "structure"),
        ([1], "structure"),
    ],
)
def test_an_answer_other_than_promised(fake, answer, text):
    fake.answers["/apply"] = answer
    with TesseractClient(fake.url) as client, pytest.raises((TesseractError, ResultError), match=text):
        apply_tesseract(client, {"x": jnp.ones(2)})


@pytest.mark.parametrize("answer", [{}, {"x": GOOD, "z": GOOD}, {"x": None}, [], {"x": {**GOOD, "shape": [2, 1]}}])
def test_a_wrong_cotangent(fake, answer):
    fake.answers["/vector_jacobian_product"] = answer
    with TesseractClient(fake.url) as client, pytest.raises((TesseractError, ResultError), match="x"):
        jax.grad(lambda x: apply_tesseract(client, {"x": x})["y"].sum())(jnp.ones(2))


def test_the_cotangent_of_a_real_number_is_the_real_part(fake):
    data = {"buffer": base64.b64encode(np.array([1 + 3j, 2 - 4j]).tobytes()).decode(), "encoding": "base64"}
    fake.answers["/vector_jacobian_product"] = {"x": {**GOOD, "dtype": "complex128", "data": data}}
    with TesseractClient(fake.url) as client:
        gradient = jax.grad(lambda x: apply_tesseract(client, {"x": x})["y"].sum())(jnp.ones(2))
    assert gradient.dtype == "float64"
    np.testing.assert_array_equal(gradient, [1.0, 2.0])


SQUARE = {**GOOD, "shape": [2, 2], "data": {"buffer": [[1.0, 2.0], [3.0, 4.0]], "encoding": "json"}}


def jacobian_of(fake, answer):
    """The Jacobian of y in x of a Tesseract that answers so, and has no other derivative."""
    fake.schema = copy.deepcopy(fake.schema)
    fake.schema["paths"] = {f"/{name}": {} for name in ("apply", "abstract_eval", "jacobian")}
    fake.answers["/jacobian"] = answer
    with TesseractClient(fake.url) as client:
        return jax.jacrev(lambda x: apply_tesseract(client, {"x": x}, vmap_method="sequential")["y"])(jnp.ones(2))


def test_a_good_jacobian(fake):
    np.testing.assert_array_equal(jacobian_of(fake, {"y": {"x": SQUARE}}), [[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({}, r"jacobian: expected the outputs \['y'\]; got \[\]"),
        ([], r"jacobian: expected the outputs \['y'\]; got \[\] of type list"),
        ({"y": {"x": SQUARE}, "z": {}}, r"jacobian: expected the outputs \['y'\]; got \['y', 'z'\]"),
        ({"y": {}}, r"jacobian: expected the fields \['x'\]; got \[\]"),
        ({"y": {"x": SQUARE, "s": SQUARE}}, r"jacobian: expected the fields \['x'\]; got \['s', 'x'\]"),
        ({"y": {"x": None}}, "jacobian: the field 'x' should be an array, but is None of type NoneType"),
    ],
)
def test_a_wrong_jacobian(fake, answer, text):
    with pytest.raises(TesseractAnswerError, match=text):
        jacobian_of(fake, answer)


@pytest.mark.parametrize("described", [{"shape": "ab", "dtype": "float64"}, {"shape": [2], "dtype": "nonsense"}])
def test_a_wrong_description(fake, described):
    fake.answers["/abstract_eval"] = {"y": described}
    with (
        TesseractClient(fake.url) as client,
        pytest.raises((TesseractAnswerError, ValueError), match=r"abstract_eval|shape"),
    ):
        apply_tesseract(client, {"x": jnp.ones(2)})
