"""A Tesseract behind one or several URLs: the endpoints as methods, arrays in and out."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from batchrules_tesseract import _replies
from batchrules_tesseract._encoding import Decoder, encode, encoder
from batchrules_tesseract._replicas import Replicas
from batchrules_tesseract._server import Request
from batchrules_tesseract._settings import Headers, Settings, checked_settings, checked_url
from batchrules_tesseract._splice import LongTexts


class TesseractClient:
    """A Tesseract behind a URL, or behind several that serve the same one.

    It has the methods of `tesseract_core.Tesseract` for calling one, and needs nothing of that package. Safe to use
    from many threads; a copy in another process (a fork, or a pickle) opens connections of its own.

    Args:
        urls: The address, or a sequence of addresses of replicas: each request goes to the least busy one.
        timeout: Seconds until an answer must be complete; None for no limit.
        connect_timeout: Seconds until a connection must stand.
        retries: How often all addresses are tried again if no connection can be made. Nothing was sent then.
        resend: How often a request is sent again whose connection broke afterwards, so that a worker may have run it.
        encoding: `"base64"`, `"json"`, or `"binref"` (files in folders that both sides see).
        input_folder: For binref, the Tesseract's input path as this program sees it.
        output_folder: For binref, the Tesseract's output path as this program sees it.
        headers: More headers for every request, or a function that returns them, called for each one.
        verify_tls: True, False, the path of a file of certificates, or an `ssl.SSLContext`.
        max_connections: How many connections to each server are kept open; have no fewer than threads.
        max_idle: Seconds after which an idle connection is not used again. Less than the server's own limit.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, a URL that is none, or no URL at all; certificates that cannot be read.

    Example:
        >>> from batchrules_tesseract import TesseractClient
        >>> with TesseractClient("localhost:8000", timeout=60.0, headers={"X-Team": "flow"}) as tesseract:
        ...     print(tesseract)
        Tesseract at http://localhost:8000
    """

    def __init__(  # noqa: PLR0913  # options, all keyword-only
        self,
        urls: str | Sequence[str],
        *,
        timeout: float | None = 600.0,
        connect_timeout: float = 10.0,
        retries: int = 2,
        resend: int = 0,
        encoding: str = "base64",
        input_folder: str | os.PathLike[str] | None = None,
        output_folder: str | os.PathLike[str] | None = None,
        headers: Headers = None,
        verify_tls: bool | str | os.PathLike[str] | ssl.SSLContext = True,
        max_connections: int = 256,
        max_idle: float = 4.0,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "urls")}
        self._start(checked_urls(urls), checked_settings(options))

    def _start(self, urls: tuple[str, ...], settings: Settings) -> None:
        self.urls = urls
        self._settings = settings
        self._replicas = Replicas(urls, settings)
        self._accept = f"application/json+{settings.encoding}" if settings.encoding != "json" else "application/json"
        self._schema: dict[str, Any] | None = None
        self._schema_lock = threading.Lock()

    def __str__(self) -> str:
        """What messages call it."""
        return f"Tesseract at {', '.join(self.urls)}"

    def __repr__(self) -> str:
        """The class and the addresses."""
        return f"TesseractClient({', '.join(map(repr, self.urls))})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy elsewhere has the same options and connections of its own."""
        return _restored, (self.urls, self._settings)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections. The client can be used again; it then opens new ones."""
        self._replicas.close()

    @property
    def openapi_schema(self) -> dict[str, Any]:
        """The Tesseract's OpenAPI schema, fetched once.

        Raises:
            TesseractError: It could not be fetched, or two replicas serve different Tesseracts.
        """
        if self._schema is None:
            with self._schema_lock:
                if self._schema is None:
                    self._schema = _replies.common_schema(self._replicas.servers, self._request("/openapi.json", None))
        return self._schema

    @property
    def available_endpoints(self) -> list[str]:
        """The names of the endpoints that the Tesseract has."""
        return [path.lstrip("/") for path in self.openapi_schema["paths"]]

    def health(self) -> dict[str, Any]:
        """Ask whether the Tesseract is well. Waits, too, while a worker is busy."""
        where = f"{self}, health"
        return _replies.parsed(self._replicas.send(self._request("/health", None)), where).value

    def apply(self, inputs: Mapping[str, Any]) -> Any:
        """Run the Tesseract.

        Args:
            inputs: As its schema says, with NumPy arrays.

        Returns:
            Its outputs, with NumPy arrays (read-only).

        Raises:
            TesseractError: One of its kinds says what failed: the input, the Tesseract, the connection, the answer.
        """
        return self._call("apply", {"inputs": inputs})

    def abstract_eval(self, abstract_inputs: Mapping[str, Any]) -> Any:
        """Ask for the shapes of the outputs.

        Args:
            abstract_inputs: The inputs with `{"shape": ..., "dtype": ...}` in place of arrays.

        Returns:
            The outputs, described in the same way.
        """
        return self._call("abstract_eval", {"inputs": abstract_inputs})

    def jacobian(self, inputs: Mapping[str, Any], jac_inputs: Collection[str], jac_outputs: Collection[str]) -> Any:
        """Ask for the Jacobian of these outputs in these inputs.

        Returns:
            `{output: {input: array of shape (*output, *input)}}`.
        """
        asked = {"jac_inputs": list(jac_inputs), "jac_outputs": list(jac_outputs)}
        return self._call("jacobian", {"inputs": inputs, **asked})

    def jacobian_vector_product(
        self,
        inputs: Mapping[str, Any],
        jvp_inputs: Collection[str],
        jvp_outputs: Collection[str],
        tangent_vector: Mapping[str, Any],
    ) -> Any:
        """Ask for the Jacobian of these outputs times a tangent.

        Returns:
            `{output: array}`.
        """
        asked = {"jvp_inputs": list(jvp_inputs), "jvp_outputs": list(jvp_outputs)}
        return self._call("jacobian_vector_product", {"inputs": inputs, **asked, "tangent_vector": tangent_vector})

    def vector_jacobian_product(
        self,
        inputs: Mapping[str, Any],
        vjp_inputs: Collection[str],
        vjp_outputs: Collection[str],
        cotangent_vector: Mapping[str, Any],
    ) -> Any:
        """Ask for a cotangent times the Jacobian in these inputs.

        Returns:
            `{input: array}`.
        """
        asked = {"vjp_inputs": list(vjp_inputs), "vjp_outputs": list(vjp_outputs)}
        return self._call("vector_jacobian_product", {"inputs": inputs, **asked, "cotangent_vector": cotangent_vector})

    def _call(self, endpoint: str, payload: Mapping[str, Any]) -> Any:
        where = f"{self}, {endpoint}"
        folders = self._settings.folders and self._settings.folders.for_request()
        texts = LongTexts()
        try:
            body = texts.dumps(encode(payload, encoder(self._settings.encoding, folders, texts)))
            reply = self._replicas.send(self._request(f"/{endpoint}", body))
            return Decoder(_replies.parsed(reply, where), where, folders).value()
        finally:
            if folders is not None:
                folders.clear()

    def _request(self, path: str, body: tuple[bytes, ...] | None) -> Request:
        headers = {"Content-Type": "application/json", "Accept": self._accept, **self._settings.extra_headers()}
        return Request("GET" if body is None else "POST", path, body, headers)


def checked_urls(urls: Any) -> tuple[str, ...]:
    """One or several addresses as a tuple."""
    listed = [urls] if isinstance(urls, str) else urls
    if not isinstance(listed, Sequence) or not listed:
        raise TypeError(f"a Tesseract needs a URL or a sequence of URLs; got {urls!r}.")
    return tuple(dict.fromkeys(checked_url(url) for url in listed))


def _restored(urls: tuple[str, ...], settings: Settings) -> TesseractClient:
    client = TesseractClient.__new__(TesseractClient)
    client._start(urls, settings)  # noqa: SLF001  # of its own class
    return client
