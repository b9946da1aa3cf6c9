"""docs/tesseract.md runs as it stands. The core's tests leave its code out, since they have no Tesseract."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_runs(tmp_path):
    runner, page = ROOT / "tests" / "test_docs.py", ROOT / "docs" / "tesseract.md"
    run = subprocess.run(
        [sys.executable, runner, page], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "tesseract_api.py").exists()
