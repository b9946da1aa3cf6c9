"""Long texts pass by the JSON library, and nothing else can be told from what it would have said."""

import json

import numpy as np
import orjson
import pybase64
import pytest
from batchrules_tesseract import TesseractAnswerError, TesseractClient
from batchrules_tesseract._encoding import encode, encoder
from batchrules_tesseract._splice import LONG, LongTexts, Parsed
from hypothesis import given
from hypothesis import strategies as st

LETTERS = "AB+/" * (LONG // 2)
NUMBERS = np.arange(LONG, dtype="float64")
QUOTED = r"\"buffer\":\"" + LETTERS
ENCODED = {
    "object_type": "array",
    "shape": [LONG],
    "dtype": "float64",
    "data": {"buffer": pybase64.b64encode_as_string(NUMBERS), "encoding": "base64"},
}


def test_long_texts_stand_where_their_markers_were():
    texts = LongTexts()
    payload = {"a": texts.marker(b"first"), "b": [1, texts.marker(b"second"), texts.marker(b"third")], "c": "x"}
    pieces = texts.dumps(payload)
    assert [piece for piece in pieces if piece in (b"first", b"second", b"third")] == [b"first", b"second", b"third"]
    assert json.loads(b"".join(pieces)) == {"a": "first", "b": [1, "second", "third"], "c": "x"}


def test_many_long_texts():
    texts = LongTexts()
    payload = [texts.marker(str(i).encode()) for i in range(120)]
    assert json.loads(b"".join(texts.dumps(payload))) == [str(i) for i in range(120)]


def restored(parsed, value):
    if isinstance(value, dict):
        return {key: restored(parsed, child) for key, child in value.items()}
    if isinstance(value, list):
        return [restored(parsed, child) for child in value]
    return parsed.text(value) if isinstance(value, str) else value


@pytest.mark.parametrize(
    "value",
    [
        {"buffer": LETTERS},
        {"buffer": [LETTERS, {"buffer": LETTERS * 2}]},
        [{"buffer": LETTERS}, {"buffer": "short"}, {"buffer": LETTERS}],
        {'my"buffer': LETTERS, "other": LETTERS},
        {"text": '"buffer":"' + LETTERS, "buffer": 3},
        {"buffer": 'é\n\\"' + LETTERS},
        {"buffer": LETTERS + "é"},
        {"buffer": LETTERS + '"' + LETTERS},
        {"buffer": None, "rest": LETTERS},
        [LETTERS],
        LETTERS,
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_reply_says_what_json_says(value):
    parsed = Parsed(orjson.dumps(value))
    assert restored(parsed, parsed.value) == value


@given(
    st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["buffer", "a"]), inner))
)
def test_a_long_buffer_beside_anything(value):
    whole = [value, {"buffer": LETTERS}, value]
    parsed = Parsed(orjson.dumps(whole))
    assert restored(parsed, parsed.value) == whole


@pytest.mark.parametrize("size", [LONG - 1, LONG])
def test_only_long_buffers_are_taken_out(size):
    text = "A" * size
    parsed = Parsed(orjson.dumps({"buffer": text, "rest": LETTERS}))
    assert (parsed.value["buffer"] == text) == (size < LONG)
    found = parsed.buffer(parsed.value["buffer"])
    assert (found if size < LONG else bytes(found).decode()) == text


@pytest.mark.parametrize("cut", [10, -1, -3, -(LONG // 2)])
def test_a_reply_that_was_cut_off(fake, cut):
    fake.answers["/apply"] = orjson.dumps({"y": ENCODED})[:cut]
    with TesseractClient(fake.url) as client, pytest.raises(TesseractAnswerError, match="not JSON"):
        client.apply({})


@pytest.mark.parametrize("bad", ["%", "\\u0041", "é", "\x00"])
def test_a_long_buffer_that_is_no_base64(fake, bad):
    text = ENCODED["data"]["buffer"]
    body = orjson.dumps({"y": ENCODED}).replace(text[:8].encode(), bad.encode(), 1)
    fake.answers["/apply"] = body
    with TesseractClient(fake.url) as client, pytest.raises(TesseractAnswerError, match=r"base64|bytes|not JSON"):
        client.apply({})


def test_a_long_buffer_whose_slashes_are_escaped(fake):
    numbers = np.full(LONG, -np.nan)  # all its letters are slashes and a few others
    text = pybase64.b64encode_as_string(numbers)
    assert "/" in text
    body = orjson.dumps({"y": {**ENCODED, "data": {"buffer": text, "encoding": "base64"}}})
    fake.answers["/apply"] = body.replace(b"/", rb"\/")
    with TesseractClient(fake.url) as client:
        assert client.apply({})["y"].tobytes() == numbers.tobytes()


def test_a_large_array_passes_by_the_json():
    texts = LongTexts()
    pieces = texts.dumps(encode({"a": NUMBERS, "b": NUMBERS[:2]}, encoder("base64", None, texts)))
    assert [len(piece) > LONG for piece in pieces] == [False, True, False]


def test_a_long_static_text_called_buffer(fake):
    fake.answers["/apply"] = {"y": ENCODED, "log": {"buffer": LETTERS, "more": [QUOTED]}}
    with TesseractClient(fake.url) as client:
        answer = client.apply({})
    np.testing.assert_array_equal(answer["y"], NUMBERS)
    assert answer["log"] == {"buffer": LETTERS, "more": [QUOTED]}


def test_a_static_text_that_is_no_text_of_json(fake):
    fake.answers["/apply"] = b'{"buffer":"' + LETTERS.encode() + b'\x01"}'
    with TesseractClient(fake.url) as client, pytest.raises(TesseractAnswerError, match="'buffer'"):
        client.apply({})


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[::-1], lambda x: x.reshape(256, -1).T], ids=["", "reversed", "transposed"]
)
def test_several_large_arrays(fake, view):
    received = []

    def answer(handler):
        received.append(json.loads(handler.body))
        handler.reply({"y": ENCODED}, 200)

    fake.answers["/apply"] = answer
    large = view(NUMBERS)
    with TesseractClient(fake.url) as client:
        client.apply({"a": large, "b": [np.float32(1.0), large], "c": "text"})
    (inputs,) = [one["inputs"] for one in received]
    for sent in (inputs["a"], inputs["b"][1]):
        array = np.frombuffer(pybase64.b64decode(sent["data"]["buffer"]), sent["dtype"]).reshape(sent["shape"])
        np.testing.assert_array_equal(array, large)
    assert inputs["b"][0]["shape"] == []
    assert inputs["c"] == "text"
