"""Several servers of one Tesseract: each request goes to the least busy one that can be reached."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence

from batchrules_tesseract._errors import TesseractConnectionLostError, TesseractUnreachableError
from batchrules_tesseract._server import Reply, Request, Server
from batchrules_tesseract._settings import Settings

_PAUSE = 0.1
_DOWN_SECONDS = 2.0


class Replicas:
    """The servers of one Tesseract.

    Args:
        urls: Their addresses.
        settings: How to speak to them.
    """

    def __init__(self, urls: Sequence[str], settings: Settings) -> None:
        self.servers = tuple(Server(url, settings) for url in urls)
        self._settings = settings
        self._lock = threading.Lock()
        self._turn = itertools.count()

    def send(self, request: Request) -> Reply:
        """Send a request to the least busy server; to another one only if no worker can have seen it.

        Raises:
            TesseractUnreachableError: No server could be reached.
            TesseractConnectionLostError: The connection broke after the request was sent.
            TesseractTimeoutError: No answer within the timeout.
        """
        for _ in range(self._settings.resend):
            with contextlib.suppress(TesseractConnectionLostError):
                return self._send_once(request)
        return self._send_once(request)

    def close(self) -> None:
        """Close all connections that are not in use."""
        for server in self.servers:
            server.close()

    def _send_once(self, request: Request) -> Reply:
        failures: dict[str, TesseractUnreachableError] = {}
        limit = self._settings.timeout
        started = time.monotonic()
        for attempt in range(self._settings.retries + 1):
            if attempt and limit is not None and time.monotonic() - started + _PAUSE > limit:
                break
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            tried: set[Server] = set()
            while len(tried) < len(self.servers):
                with self._least_busy(tried) as server:
                    tried.add(server)
                    try:
                        return server.send(request)
                    except TesseractUnreachableError as error:
                        server.down_until = time.monotonic() + _DOWN_SECONDS
                        failures[server.url] = error
        raise _none_reached(list(failures.values()))

    @contextlib.contextmanager
    def _least_busy(self, tried: set[Server]) -> Iterator[Server]:
        if len(self.servers) == 1:
            yield self.servers[0]
            return
        with self._lock:
            server = self._choose(tried)
            server.in_flight += 1
        try:
            yield server
        finally:
            with self._lock:
                server.in_flight -= 1

    def _choose(self, tried: set[Server]) -> Server:
        now, first = time.monotonic(), next(self._turn)
        count = len(self.servers)
        turns = [self.servers[(first + i) % count] for i in range(count)]
        left = [server for server in turns if server not in tried]
        return min(left, key=lambda server: (server.down_until > now, server.in_flight))


def _none_reached(failures: Sequence[TesseractUnreachableError]) -> TesseractUnreachableError:
    if len(failures) == 1:
        return failures[0]
    listed = "\n".join(f"  {failure}" for failure in failures)
    return TesseractUnreachableError(f"none of the {len(failures)} servers could be reached:\n{listed}")
