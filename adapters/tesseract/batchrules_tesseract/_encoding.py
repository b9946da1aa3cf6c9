"""Arrays as JSON and back. What comes back is checked before it is used, and never unpickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pybase64

from batchrules_tesseract._errors import TesseractAnswerError
from batchrules_tesseract._shared_folder import SharedFolders
from batchrules_tesseract._splice import LONG, LongTexts, Parsed

Array = np.ndarray[Any, Any]

ENCODINGS = ("base64", "json", "binref")
_DTYPES = """
    bool complex64 complex128 float16 float32 float64
    int8 int16 int32 int64 uint8 uint16 uint32 uint64
"""
DTYPES = frozenset(_DTYPES.split())


def raw_bytes(array: Array) -> Array:
    """The array's elements in order, as bytes, without a copy where they lie in order already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def encoder(encoding: str, folders: SharedFolders | None, texts: LongTexts) -> Callable[[Array], dict[str, Any]]:
    """What turns an array's elements into the `data` of a request."""
    if encoding == "binref" and folders is not None:
        return folders.write
    return _as_json if encoding == "json" else partial(_as_base64, texts=texts)


def _as_base64(array: Array, *, texts: LongTexts) -> dict[str, Any]:
    data: Any = raw_bytes(array)  # a buffer, which type checkers learn only from Python 3.12 on
    if array.nbytes >= LONG:
        return {"buffer": texts.marker(pybase64.b64encode(data)), "encoding": "base64"}
    return {"buffer": pybase64.b64encode_as_string(data), "encoding": "base64"}


def _as_json(array: Array) -> dict[str, Any]:
    if array.dtype.kind == "c" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise ValueError(
            f"JSON has no numbers for this array ({array.dtype}, shape {array.shape}): it is complex, or holds NaN or "
            "infinity. Use encoding='base64', which holds every number."
        )
    return {"buffer": array.tolist(), "encoding": "json"}


def encode(value: Any, encode_data: Callable[[Array], dict[str, Any]], path: str = "") -> Any:
    """A request's payload with every array in it encoded.

    Raises:
        ValueError: A number that JSON does not have, outside an array.
    """
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        data = encode_data(array)
        return {"object_type": "array", "shape": array.shape, "dtype": array.dtype.name, "data": data}
    if isinstance(value, Mapping):
        return {key: encode(child, encode_data, f"{path}.{key}") for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [encode(child, encode_data, f"{path}.[{i}]") for i, child in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"JSON has no number for {path.lstrip('.')!r}, which is {value}. Pass an array, or leave it out."
        )
    return value


class Decoder:
    """Reads the arrays of one answer.

    Args:
        answer: The answer.
        where: The Tesseract and the endpoint, for messages.
        folders: Where binref buffers lie, or None if none were asked for.
    """

    def __init__(self, answer: Parsed, where: str, folders: SharedFolders | None) -> None:
        self._answer = answer
        self._where = where
        self._folders = folders

    def value(self) -> Any:
        """The answer, every encoded array in it read.

        Raises:
            TesseractAnswerError: An array whose shape, dtype and buffer do not fit together.
        """
        return self._decode(self._answer.value, "")

    def _decode(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            if value.get("object_type") == "array":
                return self._array(value, path.lstrip("."))
            return {key: self._decode(child, f"{path}.{key}") for key, child in value.items()}
        if isinstance(value, list):
            return [self._decode(child, f"{path}.[{i}]") for i, child in enumerate(value)]
        return self._text(value, path) if isinstance(value, str) else value

    def _text(self, text: str, path: str) -> str:
        try:
            return self._answer.text(text)
        except ValueError as error:
            raise self._wrong(path.lstrip("."), f"is not a text of JSON ({error})") from error

    def _array(self, encoded: Mapping[str, Any], path: str) -> Array:
        shape, dtype = self._shape(encoded.get("shape"), path), self._dtype(encoded.get("dtype"), path)
        data = encoded.get("data")
        if not isinstance(data, dict):
            raise self._wrong(path, f"has no data, but {data!r}")
        if data.get("compression") is not None:
            raise self._wrong(path, f"is compressed ({data['compression']!r}), which was not asked for")
        if data.get("encoding") == "json":
            return self._from_json(data.get("buffer"), shape, dtype, path)
        raw = self._buffer(data, math.prod(shape) * dtype.itemsize, path)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _buffer(self, data: Mapping[str, Any], size: int, path: str) -> Any:
        buffer, encoding = self._answer.buffer(data.get("buffer")), data.get("encoding")
        if not isinstance(buffer, str | memoryview):
            raise self._wrong(path, f"has a buffer of type {type(buffer).__name__}; expected a string")
        if encoding == "base64":
            raw = self._from_base64(buffer, path)
        elif encoding == "binref" and self._folders is not None:
            raw = self._folders.read(str(data["buffer"]), size, lambda reason: self._wrong(path, reason))
        else:
            raise self._wrong(path, f"comes in the encoding {encoding!r}, which was not asked for")
        if len(raw) != size:
            raise self._wrong(path, f"has a buffer of {len(raw)} bytes, but its shape and dtype need {size}")
        return raw

    def _from_base64(self, buffer: str | memoryview, path: str) -> bytes:
        try:
            return pybase64.b64decode(buffer, validate=True)
        except ValueError as error:
            raise self._wrong(path, f"is not valid base64 ({error})") from error

    def _from_json(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any], path: str) -> Array:
        try:
            array = np.array(buffer, dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._wrong(path, f"does not hold numbers of dtype {dtype} ({error})") from error
        if array.shape != shape and array.size + math.prod(shape) > 0:
            raise self._wrong(path, f"holds numbers of shape {array.shape}, but says {shape}")
        return array.reshape(shape)

    def _shape(self, shape: Any, path: str) -> tuple[int, ...]:
        if isinstance(shape, Sequence) and all(type(size) is int and size >= 0 for size in shape):
            return tuple(shape)
        raise self._wrong(path, f"has the shape {shape!r}; expected a list of whole numbers from 0")

    def _dtype(self, dtype: Any, path: str) -> np.dtype[Any]:
        if isinstance(dtype, str) and dtype in DTYPES:
            return np.dtype(dtype)
        raise self._wrong(path, f"has the dtype {dtype!r}; expected one of {sorted(DTYPES)}")

    def _wrong(self, path: str, reason: str) -> TesseractAnswerError:
        return TesseractAnswerError(f"{self._where}: the field {path!r} of the answer {reason}.")
