"""Serve a Tesseract on this machine, without Docker, and stop it again."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
STARTUP_SECONDS = 120


@dataclass(frozen=True)
class Served:
    """A Tesseract that answers at `url`, and the log of the calls it got."""

    url: str
    log: Path
    output_path: Path

    def calls(self) -> Counter[str]:
        """How many calls each endpoint got since the last `forget`."""
        return Counter(line.split()[0] for line in self.lines())

    def lines(self) -> list[str]:
        """One line for each call: the endpoint and the shapes of its arrays."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def forget(self) -> None:
        """Count from zero."""
        self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def serve(
    name: str, *, workers: int = 1, without: str = "", settings: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Serve `tesseracts/<name>.py` with that many workers until the block ends.

    Args:
        name: The file's name.
        workers: How many processes answer.
        without: Endpoints to leave out, separated by commas.
        settings: More environment variables, such as `TESSERACT_INPUT_PATH`.
    """
    with tempfile.TemporaryDirectory() as folder:
        served = Served(f"http://127.0.0.1:{free_port()}", Path(folder, "calls.log"), Path(folder, "out"))
        served.output_path.mkdir()
        process = _start(HERE / f"{name}.py", served, workers, {"WITHOUT": without, **(settings or {})})
        try:
            _wait(served.url, process)
            yield served
        finally:
            _stop(process)


def load(name: str, *, without: str = "") -> types.ModuleType:
    """The module of `tesseracts/<name>.py`, for `Tesseract.from_tesseract_api`."""
    spec = importlib.util.spec_from_file_location(f"in_process_{name}", HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"tesseracts/{name}.py could not be loaded")
    module = importlib.util.module_from_spec(spec)
    # Pydantic looks up annotations in the module they were written in.
    sys.modules[spec.name] = module
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    with _environment("WITHOUT", without):
        spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(api: Path, served: Served, workers: int, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = dict(
        os.environ,
        TESSERACT_API_PATH=str(api),
        TESSERACT_OUTPUT_PATH=str(served.output_path),
        CALLS_LOG=str(served.log),
        JAX_ENABLE_X64="1",
        JAX_PLATFORMS="cpu",
        **settings,
    )
    port = served.url.rpartition(":")[2]
    runtime = [sys.executable, "-m", "tesseract_core.runtime", "serve", "--host", "127.0.0.1"]
    return subprocess.Popen(  # noqa: S603  # this interpreter, on files of this folder
        [*runtime, "--port", port, "--num-workers", str(workers)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the Tesseract ended with status {process.returncode} before it answered")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()  # noqa: S310  # always http
            return
        time.sleep(0.1)
    raise TimeoutError(f"the Tesseract at {url} did not answer within {STARTUP_SECONDS} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    # The workers are children of their own: end the whole session. There is nothing that they have to save.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
