"""Each file of examples/ as a user runs it, in an interpreter of its own. It fails if its numbers are wrong.

An example whose packages are not there is skipped. `make examples` sets ALL_EXAMPLES, and installs what they need; then
a missing package is a failure, except where CI has no room for it.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
SECONDS = 300

NEEDS = {
    "dask_cluster": ["distributed", "scipy"],
    "ffi_kernel": [],
    "http_service": ["fastapi", "httpx", "uvicorn"],
    "lineax_operator": ["lineax", "scipy"],
    "numpyro_sampling": ["numpyro"],
    "scipy_ode_sweep": ["scipy"],
    "tesseract_pipeline": ["batchrules_tesseract", "fastapi", "optax", "tesseract_core"],
    "torch_module": ["torch"],
}
TOO_LARGE = {"torch"}


def refuse_or_skip(name):
    """Skip an example that cannot run here, or fail where it must."""
    missing = {package for package in NEEDS[name] if importlib.util.find_spec(package) is None}
    if missing - TOO_LARGE and "ALL_EXAMPLES" in os.environ:
        pytest.fail(f"examples/requirements.txt should have brought {sorted(missing)}")
    if missing:
        remark = "too large for CI" if missing & TOO_LARGE else "see examples/README.md"
        pytest.skip(f"not installed: {', '.join(sorted(missing))} ({remark})")
    if name == "ffi_kernel" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")


def run(path, folder):
    """The exit status and all output of an example."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", path],
        env={**os.environ, "PYTHONPATH": search_path},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it ends the servers that it started
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"not done after {SECONDS} s:\n{output}")
    return process.returncode, output


def test_every_example_is_listed():
    assert set(NEEDS) == set(FILES)
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.py)" in readme for name in FILES)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path):
    refuse_or_skip(name)
    status, output = run(FILES[name], tmp_path)
    sys.stdout.write(f"\n--- {name}.py\n{output}")  # shown by `make examples`, which passes -s
    assert status == 0, output
