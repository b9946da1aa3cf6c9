"""JSON in which the long texts are never copied: the buffers of large arrays, many megabytes of base64.

A JSON library checks and copies every character of a text, which for base64 is work for nothing. So a long text is
sent beside the JSON around it, and found in a reply before the rest is read; a marker stands for it meanwhile.
"""

from __future__ import annotations

import secrets
from typing import Any

import orjson

LONG = 1 << 16
# Nobody can know it, so no text of a payload can be taken for a marker.
_MARKER = f"batchrules-{secrets.token_hex(16)}-"
_KEY = b'"buffer":"'


class LongTexts:
    """The long texts of one request. Each is ASCII that JSON need not escape."""

    def __init__(self) -> None:
        self._texts: list[bytes] = []

    def marker(self, text: bytes) -> str:
        """What stands for a text in the payload."""
        self._texts.append(text)
        return f"{_MARKER}{len(self._texts) - 1}-"

    def dumps(self, payload: Any) -> tuple[bytes, ...]:
        """The payload as JSON, in pieces."""
        rest = orjson.dumps(payload)
        pieces: list[bytes] = []
        for i, text in enumerate(self._texts):
            before, _, rest = rest.partition(f"{_MARKER}{i}-".encode())
            pieces += [before, text]
        return (*pieces, rest)


class Parsed:
    """A reply's JSON with markers for its long buffers.

    Attributes:
        value: What the JSON says.
    """

    def __init__(self, body: bytes | bytearray) -> None:
        """Read a reply.

        Raises:
            ValueError: It is not JSON.
        """
        self._texts: dict[str, memoryview] = {}
        self.value = orjson.loads(body if len(body) < LONG else self._without_long(body))

    def buffer(self, text: Any) -> Any:
        """The text of a buffer; as bytes, not copied, if it is long."""
        return self._texts.get(text, text) if self._texts and isinstance(text, str) else text

    def text(self, text: str) -> str:
        """A text that is no buffer of an array, although it may be called so.

        Raises:
            ValueError: It is not a text of JSON.
        """
        long = self._texts.get(text)
        return text if long is None else orjson.loads(b'"%b"' % long)

    def _without_long(self, body: bytes | bytearray) -> bytes:
        """The body with a marker for each long buffer. A quote inside a text is escaped, so none is found in there."""
        whole = memoryview(body)
        pieces: list[bytes | memoryview] = []
        done = at = 0
        while (key := body.find(_KEY, at)) >= 0:
            start = key + len(_KEY)
            end = body.find(b'"', start)
            if end < 0:
                break
            if end - start >= LONG and body.find(b"\\", start, end) < 0:
                marker = f"{_MARKER}{len(self._texts)}-"
                self._texts[marker] = whole[start:end]
                pieces += [whole[done:start], marker.encode()]
                done = end
            at = end
        return b"".join((*pieces, whole[done:]))
