"""One server: its connections, its timeouts, and what each failure of a request means."""

from __future__ import annotations

import math
import os
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Timeout, parse_url

from batchrules_tesseract._errors import (
    TesseractConnectionLostError,
    TesseractError,
    TesseractTimeoutError,
    TesseractUnreachableError,
)
from batchrules_tesseract._settings import Settings

_CHUNK = 1 << 20
_SERVER_ERROR = 500
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


@dataclass(frozen=True)
class Request:
    """What is sent, and how it is called in messages."""

    method: str
    path: str
    body: bytes | None
    headers: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    body: bytes
    url: str


class _Kept:
    """A connection that is not used again after a pause: the server may be closing it at that moment.

    A request that was sent on a connection just closed may or may not have run, so it could not be sent again.
    Mixed into urllib3's connections, whose attributes it uses and a type checker cannot see here.
    """

    max_idle = 4.0
    last_used = 0.0

    @property
    def is_connected(self) -> bool:
        return super().is_connected and time.monotonic() - self.last_used < self.max_idle  # type: ignore[misc]  # urllib3's, see above

    def getresponse(self) -> Any:
        sock = self.sock  # type: ignore[attr-defined]  # as above
        if _QUICKACK is not None and sock is not None:
            # Behind several workers uvicorn leaves Nagle's algorithm on: without a quick acknowledgement of the
            # headers, the body of every answer comes 40 ms late.
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        reply = super().getresponse()  # type: ignore[misc]  # urllib3's, see above
        # After an exception uvicorn closes the connection, and does not say so.
        self.last_used = time.monotonic() if reply.status < _SERVER_ERROR else -math.inf
        return reply


class _Connection(_Kept, HTTPConnection):
    pass


class _TlsConnection(_Kept, HTTPSConnection):
    pass


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
        self._prefix = parse_url(url).path or ""
        limits = [limit for limit in (settings.connect_timeout, settings.timeout) if limit is not None]
        self._timeout = Timeout(connect=min(limits), read=settings.timeout)
        self._lock = threading.Lock()
        self._pool: Any = None
        self._owner = 0

    def send(self, request: Request) -> Reply:
        """Send a request and read the whole answer.

        Raises:
            TesseractUnreachableError: No connection, so the request was not sent.
            TesseractConnectionLostError: The connection broke after the request was sent.
            TesseractTimeoutError: No answer within the timeout.
        """
        url = f"{self.url}{request.path}"
        deadline = None if self._settings.timeout is None else time.monotonic() + self._settings.timeout
        try:
            response = self._connections().urlopen(
                request.method, f"{self._prefix}{request.path}", body=request.body, headers=request.headers,
                retries=False, redirect=False, preload_content=False, assert_same_host=False,
                timeout=self._timeout,
            )  # fmt: skip
            body = _read(response, deadline)
        except urllib3.exceptions.HTTPError as error:
            raise _meaning(error, url, self._settings) from error
        except TimeoutError as error:
            raise _late(url, self._settings) from error
        return Reply(response.status, body, url)

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    def _connections(self) -> Any:
        pool = self._pool
        if pool is not None and self._owner == os.getpid():
            return pool
        with self._lock:
            # A forked process shares its parent's sockets: it must open its own.
            if self._pool is None or self._owner != os.getpid():
                self._pool, self._owner = _pool(self.url, self._settings), os.getpid()
            return self._pool


def _pool(url: str, settings: Settings) -> Any:
    parts = parse_url(url)
    if parts.host is None:
        raise ValueError(f"{url!r} names no host")
    kept = {"max_idle": settings.max_idle}
    options: dict[str, Any] = {"host": parts.host, "port": parts.port, "maxsize": settings.max_connections}
    pool: Any
    if parts.scheme == "https":
        pool = urllib3.HTTPSConnectionPool(**options, **_tls(settings.verify_tls))
        pool.ConnectionCls = type("TlsConnection", (_TlsConnection,), kept)
    else:
        pool = urllib3.HTTPConnectionPool(**options)
        pool.ConnectionCls = type("Connection", (_Connection,), kept)
    return pool


def _tls(verify: Any) -> dict[str, Any]:
    if isinstance(verify, ssl.SSLContext):
        return {"ssl_context": verify}
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return {"ssl_context": context, "cert_reqs": "CERT_NONE", "assert_hostname": False}
    context = ssl.create_default_context(cafile=None if verify is True else os.fspath(verify))
    return {"ssl_context": context}


def _read(response: Any, deadline: float | None) -> bytes:
    """The whole body. The timeout of a socket is for each packet, so the time is looked at between them too."""
    chunks = []
    try:
        while chunk := response.read1(_CHUNK):
            chunks.append(chunk)
            _check_time(deadline)
    except BaseException:
        # The rest of the answer is still to come: nobody else may get this connection.
        response.close()
        raise
    response.release_conn()
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _check_time(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise TimeoutError


def _meaning(error: Exception, url: str, settings: Settings) -> TesseractError:
    # A timeout while connecting is a kind of timeout in urllib3, and a failed look-up a kind of new connection.
    unreached = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    if isinstance(error, unreached):
        return TesseractUnreachableError(
            f"{url}: no connection could be made ({error}). Is the Tesseract served there?"
        )
    if isinstance(error, urllib3.exceptions.SSLError):
        return TesseractError(
            f"{url}: the connection is not trusted ({error}). Give the certificates with verify_tls=."
        )
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return _late(url, settings)
    return TesseractConnectionLostError(
        f"{url}: the connection broke before the answer was complete ({error}). The worker may have died on this "
        "input; the request may have run, so it was not sent again (resend= would)."
    )


def _late(url: str, settings: Settings) -> TesseractTimeoutError:
    return TesseractTimeoutError(
        f"{url}: no answer within {settings.timeout} s. If the Tesseract needs longer, make the client with "
        "TesseractClient(url, timeout=...)."
    )
