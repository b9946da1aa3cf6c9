"""The Tesseract adapter beside tesseract-jax, against Tesseracts that are served here.

Its script stands with the adapter, and runs in a process of its own. Needs `tesseract-jax` and `adapters/tesseract`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from timing import Row, ratio_row, show

SCRIPT = Path(__file__).resolve().parent.parent / "adapters" / "tesseract" / "benchmarks" / "run.py"
NEEDED = ("tesseract_jax", "tesseract_core", "batchrules_tesseract")


def rows() -> Iterator[Row]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"(not measured: the Tesseract adapter, which needs {', '.join(missing)})")
        return
    run = subprocess.Popen([sys.executable, str(SCRIPT), "--json"], stdout=subprocess.PIPE, text=True)  # noqa: S603
    with run:
        for line in run.stdout or ():
            case = json.loads(line)
            ours, theirs = case["ours"] / 1e3, case["theirs"] / 1e3
            yield ratio_row(f"Tesseract: {case['what']}", "tesseract-jax", ours, theirs, case["target"])
    if run.returncode:
        raise SystemExit(f"{SCRIPT} exited with {run.returncode}")


if __name__ == "__main__":
    show(rows())
