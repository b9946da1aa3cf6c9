"""Any array that a Tesseract can hold survives the way there and back."""

import json

import numpy as np
from batchrules_tesseract._encoding import DTYPES, Decoder, encode, encoder
from batchrules_tesseract._splice import LongTexts, Parsed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

ANY_ARRAY = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
VIEWS = (
    lambda x: x,
    lambda x: x.T,
    lambda x: x[..., ::-1] if x.ndim else x,
    lambda x: np.broadcast_to(x, (2, *x.shape)),
)


def there_and_back(value, encoding):
    texts = LongTexts()
    sent = b"".join(texts.dumps(encode({"a": [value]}, encoder(encoding, None, texts))))
    assert json.loads(sent)["a"]
    return Decoder(Parsed(sent), "here", None).value()["a"][0]


@settings(deadline=None)
@given(ANY_ARRAY, st.sampled_from(VIEWS))
def test_base64(array, view):
    value = view(array)
    got = there_and_back(value, "base64")
    assert (got.shape, got.dtype) == (value.shape, value.dtype)
    assert got.tobytes() == value.tobytes()


@settings(deadline=None)
@given(ANY_ARRAY, st.sampled_from(VIEWS))
def test_json(array, view):
    value = view(array)
    if value.dtype.kind == "c" or not np.isfinite(value).all():
        return
    got = there_and_back(value, "json")
    assert (got.shape, got.dtype) == (value.shape, value.dtype)
    np.testing.assert_array_equal(got, value)
