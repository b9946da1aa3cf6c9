"""What `apply_tesseract` may be given: a `Tesseract` object, a client, a URL, or a list of URLs."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from typing import Any

from batchrules_tesseract._client import TesseractClient, checked_urls

_METHODS = ("apply", "openapi_schema", "available_endpoints")

_clients: dict[tuple[str, ...], TesseractClient] = {}
_lock = threading.Lock()


def as_tesseract(given: Any) -> Any:
    """Something with the endpoints as methods. The same URLs give the same client.

    Raises:
        TypeError: It is neither a Tesseract, nor a URL, nor a sequence of URLs.
    """
    if isinstance(given, TesseractClient):
        return given
    if isinstance(given, str) or (isinstance(given, Sequence) and given):
        return _client_for(checked_urls(given))
    if all(hasattr(type(given), name) for name in _METHODS):
        return given
    raise TypeError(
        "the first argument must be a Tesseract: a tesseract_core.Tesseract, a TesseractClient, a URL, or a sequence "
        f"of URLs; got {given!r} of type {type(given).__name__}."
    )


def in_process(tesseract: Any) -> bool:
    """Whether a Tesseract runs in this process, where it may use JAX and must be called in order."""
    if isinstance(tesseract, TesseractClient):
        return False
    # Only what is reached over HTTP has a server with capabilities.
    return getattr(tesseract, "server_capabilities", None) is None


def name_of(tesseract: Any) -> str:
    """What messages call a Tesseract."""
    if isinstance(tesseract, TesseractClient):
        return str(tesseract)
    title = tesseract.openapi_schema.get("info", {}).get("title")
    return f"Tesseract {title!r}" if title else "Tesseract"


def close_all() -> None:
    """Close the connections that were opened for URLs given to `apply_tesseract`. They open again when needed."""
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()


def _client_for(urls: tuple[str, ...]) -> TesseractClient:
    with _lock:
        if urls not in _clients:
            _clients[urls] = TesseractClient(urls)
        return _clients[urls]


atexit.register(close_all)
