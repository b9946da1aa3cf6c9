"""How a Tesseract is spoken to: the options of a client, checked once."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from batchrules_tesseract._encoding import ENCODINGS
from batchrules_tesseract._shared_folder import SharedFolders, shared_folders

Headers = Mapping[str, str] | Callable[[], Mapping[str, str]] | None


@dataclass(frozen=True)
class Settings:
    """The options of a client.

    Attributes:
        timeout: Seconds until an answer must be complete, or None for no limit.
        connect_timeout: Seconds until a connection must stand.
        retries: How often all servers are tried again if none can be reached.
        resend: How often a request is sent again that a worker may have run.
        encoding: How arrays travel.
        folders: For binref, the folders shared with the Tesseract.
        headers: More headers for every request, or a function that gives them.
        verify_tls: True, False, a file of certificates, or an `ssl.SSLContext`.
        max_connections: How many connections to a server are kept open.
        max_idle: Seconds after which an unused connection is not used again.
    """

    timeout: float | None = 600.0
    connect_timeout: float = 10.0
    retries: int = 2
    resend: int = 0
    encoding: str = "base64"
    folders: SharedFolders | None = None
    headers: Headers = None
    verify_tls: bool | str | ssl.SSLContext = True
    max_connections: int = 256
    max_idle: float = 4.0

    def extra_headers(self) -> Mapping[str, str]:
        """The user's headers for the next request."""
        given = self.headers() if callable(self.headers) else self.headers
        return given or {}


def checked_settings(options: Mapping[str, Any]) -> Settings:
    """Settings from the options of a client.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, an unknown encoding, or a folder that is missing.
    """
    given = dict(options)
    folders = shared_folders(
        given.pop("input_folder"), given.pop("output_folder"), _checked_encoding(given["encoding"])
    )
    for name in ("connect_timeout", "max_idle"):
        _check_seconds(name, given[name])
    if given["timeout"] is not None:
        _check_seconds("timeout", given["timeout"])
    for name, least in (("retries", 0), ("resend", 0), ("max_connections", 1)):
        _check_count(name, given[name], least)
    headers = given["headers"]
    if headers is not None and not callable(headers) and not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping, or a function that returns one; got {headers!r}.")
    if not isinstance(given["verify_tls"], bool | str | os.PathLike | ssl.SSLContext):
        raise TypeError(
            "verify_tls must be True, False, the path of a file of certificates, or an ssl.SSLContext; "
            f"got {given['verify_tls']!r}."
        )
    return Settings(folders=folders, **given)


def checked_url(url: Any) -> str:
    """The address of a server, without a slash at its end; `http://` where no scheme is given.

    Raises:
        TypeError: Not a string.
        ValueError: Another scheme than http and https, or no host.
    """
    if not isinstance(url, str):
        raise TypeError(f"a Tesseract's URL must be a string such as 'http://localhost:8000'; got {url!r}.")
    full = url if "://" in url else f"http://{url}"
    parts = urlsplit(full)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"a Tesseract's URL must look like 'http://localhost:8000'; got {url!r}.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _checked_encoding(encoding: Any) -> str:
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(map(repr, ENCODINGS))}; got {encoding!r}.")
    return encoding


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds; got {value!r} of type {type(value).__name__}.")
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name} must be more than 0 seconds; got {value!r}.")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}.")
