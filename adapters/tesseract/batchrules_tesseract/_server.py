"""One server: a request, its answer, and what each failure means."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from batchrules_tesseract._connections import Connection, Connections
from batchrules_tesseract._errors import (
    TesseractConnectionLostError,
    TesseractError,
    TesseractTimeoutError,
    TesseractUnreachableError,
)
from batchrules_tesseract._settings import Settings

# An answer says how long it is, but that is only a claim: no more memory is taken at once.
_MOST_AT_ONCE = 1 << 26
_SERVER_ERROR = 500


@dataclass(frozen=True)
class Request:
    """What is sent. The body is in pieces, because joining large ones would copy them."""

    method: str
    path: str
    body: tuple[bytes, ...] | None
    headers: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    body: bytes | bytearray
    url: str


class Server:
    """One server of a Tesseract. Safe to use from many threads, and after a fork.

    Args:
        url: Its address.
        settings: How to speak to it.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.in_flight = 0
        self.down_until = 0.0
        self._settings = settings
        self._prefix = urlsplit(url).path
        self._connections = Connections(url, settings)

    def send(self, request: Request) -> Reply:
        """Send a request and read the whole answer.

        Raises:
            TesseractUnreachableError: No connection, so the request was not sent.
            TesseractConnectionLostError: The connection broke after the request was sent.
            TesseractTimeoutError: No answer within the timeout.
        """
        url = f"{self.url}{request.path}"
        limit = self._settings.timeout
        connection = self._connected(url, None if limit is None else time.monotonic() + limit)
        try:
            response = _sent(connection, request, f"{self._prefix}{request.path}")
            body = _read(response)
        except TimeoutError as error:
            connection.close()
            raise _late(url, self._settings) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _lost(url, error) from error
        except BaseException:
            # The rest of the answer is still to come: nobody else may get this connection.
            connection.close()
            raise
        if response.status >= _SERVER_ERROR:
            # After an exception uvicorn closes the connection, and does not say so.
            connection.close()
        elif connection.sock is not None:
            self._connections.give_back(connection)
        return Reply(response.status, body, url)

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._connections.close()

    def _connected(self, url: str, deadline: float | None) -> Connection:
        try:
            return self._connections.take(deadline)
        except ssl.SSLError as error:
            raise TesseractError(
                f"{url}: the connection is not trusted ({error}). Give the certificates with verify_tls=."
            ) from error
        except (OSError, UnicodeError) as error:
            raise TesseractUnreachableError(
                f"{url}: no connection could be made ({error}). Is the Tesseract served there?"
            ) from error


def _sent(connection: Connection, request: Request, path: str) -> http.client.HTTPResponse:
    headers, body = request.headers, request.body
    if body is not None:
        headers = {**headers, "Content-Length": str(sum(map(len, body)))}
    with _answered_early():
        connection.post(request.method, path, body, headers)
    return connection.getresponse()


@contextlib.contextmanager
def _answered_early() -> Iterator[None]:
    """A server that refuses a body may answer, and close, before it has read it: the answer says why."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        yield


def _read(response: http.client.HTTPResponse) -> bytes | bytearray:
    """The whole body, where it is as long as was said into one piece of memory."""
    length = response.length
    if length is None:
        return response.read()
    body = bytearray(min(length, _MOST_AT_ONCE))
    filled = 0
    while filled < length:
        if filled == len(body):
            body.extend(bytes(min(length - filled, _MOST_AT_ONCE)))
        with memoryview(body) as whole, whole[filled:] as rest:
            count = response.readinto(rest)
        if not count:
            raise http.client.IncompleteRead(bytes(body[:200]), length - filled)
        filled += count
    response.close()
    return body


def _lost(url: str, error: Any) -> TesseractConnectionLostError:
    return TesseractConnectionLostError(
        f"{url}: the connection broke before the answer was complete ({error}). The worker may have died on this "
        "input; the request may have run, so it was not sent again (resend= would)."
    )


def _late(url: str, settings: Settings) -> TesseractTimeoutError:
    return TesseractTimeoutError(
        f"{url}: no answer within {settings.timeout} s. If the Tesseract needs longer, make the client with "
        "TesseractClient(url, timeout=...)."
    )
