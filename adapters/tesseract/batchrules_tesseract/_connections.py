"""The open connections to one server: kept while they are fresh, shared among threads, never across a fork."""

from __future__ import annotations

import http.client
import io
import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from batchrules_tesseract._settings import Settings

_QUICKACK = getattr(socket, "TCP_QUICKACK", None)
# Pieces of a request up to this size go out together; joining larger ones would cost more than sending them apart.
_JOINED = 1 << 16


class _Timed(io.RawIOBase):
    """What a socket receives, until a deadline. A socket's own timeout is for each packet, however few bytes it has."""

    def __init__(self, sock: socket.socket, deadline: float | None) -> None:
        self._sock = sock
        # Which keeps the socket open, if `http.client` closes it before the answer was read.
        self._received = sock.makefile("rb", buffering=0)
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What `http.client` reads a reply from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive some bytes.

        Raises:
            TimeoutError: None came before the deadline.
        """
        set_deadline(self._sock, self._deadline)
        return self._received.readinto(buffer) or 0

    def close(self) -> None:
        """Let go of the socket."""
        self._received.close()
        super().close()


def set_deadline(sock: socket.socket, deadline: float | None) -> None:
    """Let the next operation of a socket end at the deadline.

    Raises:
        TimeoutError: It is past.
    """
    if deadline is None:
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    sock.settimeout(left)


class _Exchange:
    """One request after another on one connection. Mixed into the connections of `http.client`.

    Attributes:
        deadline: When the answer to the request must be complete, in `time.monotonic` seconds; None for no limit.
        last_used: When the last answer came.
        opened_in: Which of the times between two calls of `Connections.close` it was opened in.
    """

    deadline: float | None = None
    last_used = 0.0
    opened_in = 0
    sock: Any
    _held: list[Any] | None = None

    def post(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> None:
        """Send a request, its headers and a small body in one packet: a server wakes up for each."""
        self._held = []
        try:
            self.request(method, path, body, headers)  # type: ignore[attr-defined]  # that of http.client
        finally:
            held, self._held = self._held, None
        for piece in _joined(held):
            set_deadline(self.sock, self.deadline)
            self.sock.sendall(piece)

    def send(self, data: Any) -> None:
        """Hold a piece of a request until it is complete; `http.client` calls this."""
        if self._held is None:
            super().send(data)  # type: ignore[misc]  # that of http.client
        else:
            self._held.append(data)

    def response_class(self, sock: Any, **options: Any) -> http.client.HTTPResponse:
        """A reply, which is read until the deadline; `http.client` calls this."""
        if _QUICKACK is not None:
            # Behind several workers uvicorn leaves Nagle's algorithm on: without a quick acknowledgement of the
            # headers, the body of every answer comes 40 ms late.
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        timed: Any = _Timed(sock, self.deadline)
        return http.client.HTTPResponse(timed, **options)


def _joined(pieces: list[Any]) -> list[Any]:
    """The pieces, small neighbours as one."""
    joined: list[Any] = []
    for piece in pieces:
        if joined and len(joined[-1]) + len(piece) <= _JOINED:
            joined[-1] = b"".join((joined[-1], piece))
        else:
            joined.append(piece)
    return joined


# `http.client` has a class where these have a method, and calls it in the same way.
class _Plain(_Exchange, http.client.HTTPConnection):  # pyright: ignore[reportIncompatibleVariableOverride]
    pass


class _Tls(_Exchange, http.client.HTTPSConnection):  # pyright: ignore[reportIncompatibleVariableOverride]
    pass


Connection = _Plain | _Tls


class Connections:
    """The connections to one server. Safe to use from many threads.

    Args:
        url: The server's address.
        settings: How to speak to it.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        parts = urlsplit(url)
        self._address = {"host": parts.hostname, "port": parts.port}
        self._context = _tls(settings.verify_tls) if parts.scheme == "https" else None
        self._settings = settings
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._owner = os.getpid()
        self._closed = 0
        weakref.finalize(self, _close_all, self._idle)

    def take(self, deadline: float | None) -> Connection:
        """A connection for one request: the one used last, if it is fresh, else a new one.

        Raises:
            OSError: No connection can be made.
        """
        while (connection := self._pop()) is not None:
            if self._is_fresh(connection):
                connection.deadline = deadline
                return connection
            connection.close()
        return self._connected(deadline)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection, whose answer was read whole, for the next request."""
        connection.last_used = time.monotonic()
        with self._lock:
            is_ours = self._owner == os.getpid() and connection.opened_in == self._closed
            if is_ours and len(self._idle) < self._settings.max_connections:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            self._closed += 1
            _close_all(self._idle)

    def _pop(self) -> Connection | None:
        with self._lock:
            if self._owner != os.getpid():
                # A forked process shares its parent's sockets: it must open its own. These stay open over there.
                _close_all(self._idle)
                self._owner = os.getpid()
            return self._idle.pop() if self._idle else None

    def _is_fresh(self, connection: Connection) -> bool:
        """Whether the server cannot have closed it: a request sent to a closing server may or may not have run."""
        if connection.sock is None or time.monotonic() - connection.last_used >= self._settings.max_idle:
            return False
        return not _has_news(connection.sock)

    def _connected(self, deadline: float | None) -> Connection:
        host, port = self._address["host"], self._address["port"]
        limit = self._settings.connect_timeout
        if deadline is not None:
            limit = min(limit, max(deadline - time.monotonic(), 1e-3))
        connection: Any
        if self._context is None:
            connection = _Plain(host, port, timeout=limit)
        else:
            connection = _Tls(host, port, timeout=limit, context=self._context)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        connection.sock.settimeout(None)
        connection.deadline = deadline
        connection.opened_in = self._closed
        return connection


def _close_all(connections: list[Connection]) -> None:
    while connections:
        connections.pop().close()


def _has_news(sock: socket.socket) -> bool:
    """Whether something is there to read, which on an idle connection is its end."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


def _tls(verify: Any) -> ssl.SSLContext:
    if isinstance(verify, ssl.SSLContext):
        return verify
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        return ssl.create_default_context(cafile=None if verify is True else os.fspath(verify))
    except OSError as error:
        raise ValueError(
            f"verify_tls is {verify!r}, which cannot be read as a file of certificates ({error})."
        ) from error
