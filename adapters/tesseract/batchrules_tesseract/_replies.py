"""What the status and the text of a reply mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from batchrules_tesseract._errors import (
    TesseractAnswerError,
    TesseractError,
    TesseractInputError,
    TesseractServerError,
    TesseractUnreachableError,
)
from batchrules_tesseract._server import Reply, Request, Server
from batchrules_tesseract._splice import Parsed

_MOST_TEXT = 4000
_OK, _UNPROCESSABLE = 200, 422


def parsed(reply: Reply, where: str) -> Parsed:
    """The JSON of a reply.

    Raises:
        TesseractInputError: The Tesseract refused the input.
        TesseractServerError: The Tesseract failed, or there is no such endpoint.
        TesseractAnswerError: The answer is not JSON.
    """
    if reply.status != _OK:
        raise _refusal(reply, where)
    try:
        return Parsed(reply.body)
    except orjson.JSONDecodeError as error:
        raise TesseractAnswerError(
            f"{where}: the answer is not JSON ({error}): {_text(reply.body)[:200]!r}."
        ) from error


def common_schema(servers: Sequence[Server], request: Request) -> dict[str, Any]:
    """The OpenAPI schema that all servers which can be reached share.

    Raises:
        TesseractUnreachableError: None can be reached.
        TesseractError: Two of them serve different Tesseracts.
    """
    schemas: dict[str, dict[str, Any]] = {}
    failures: list[TesseractUnreachableError] = []
    for server in servers:
        try:
            schemas[server.url] = _checked_schema(
                parsed(server.send(request), f"Tesseract at {server.url}").value, server.url
            )
        except TesseractUnreachableError as error:
            failures.append(error)
    if not schemas:
        raise failures[0]
    first, *others = schemas
    for other in others:
        if any(schemas[first][key] != schemas[other][key] for key in ("paths", "components")):
            raise TesseractError(f"{first} and {other} serve different Tesseracts: their schemas differ.")
    return schemas[first]


def _checked_schema(schema: Any, url: str) -> dict[str, Any]:
    try:
        known = schema["components"]["schemas"].keys()
        found = {"Apply_InputSchema", "Apply_OutputSchema"} <= known and "/apply" in schema["paths"]
    except (AttributeError, KeyError, TypeError):
        found = False
    if not found:
        raise TesseractAnswerError(f"{url} is no Tesseract: its /openapi.json describes no apply endpoint.")
    return schema


def _refusal(reply: Reply, where: str) -> TesseractError:
    text = _text(reply.body)
    if reply.status == _UNPROCESSABLE:
        return TesseractInputError(f"{where}: the Tesseract refused its input:\n{_fields(reply.body) or text}")
    hint = ""
    if text.strip() == "Internal Server Error":
        hint = " The Tesseract's own log, or serving it with TESSERACT_DEBUG=1, says more."
    return TesseractServerError(f"{where} ({reply.url}): the Tesseract failed with status {reply.status}: {text}{hint}")


def _text(body: bytes | bytearray) -> str:
    text = body.decode(errors="replace")
    # A traceback says most at its end.
    return text if len(text) <= _MOST_TEXT else f"... {text[-_MOST_TEXT:]}"


def _fields(body: bytes | bytearray) -> str:
    """One line for each field that was refused; empty if the reply does not list them."""
    try:
        details = orjson.loads(body)["detail"]
        return "\n".join(f"  {field_path(detail['loc'])}: {detail['msg']}" for detail in details)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def field_path(location: Iterable[Any]) -> str:
    """The path of a field from its place in a request: `a.v`, `lst.[0]`."""
    parts = [f"[{part}]" if isinstance(part, int) else str(part) for part in location]
    # A request starts with the body and, in it, the inputs; fields may be called so too.
    for start in ("body", "inputs"):
        if parts[:1] == [start]:
            parts.pop(0)
    return ".".join(parts) or "the request"
