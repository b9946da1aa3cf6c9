"""Run the whole test-suite on the oldest and on the newest supported jax.

The oldest: the lower bounds of pyproject.toml, on the oldest interpreter found. The newest: what pip
resolves, on the newest interpreter found. Only the standard library is used: any Python from 3.11 runs this.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-matrix"
VERSIONS = ("3.11", "3.12", "3.13")
REPORT = (
    "import platform; from importlib.metadata import version as v; print('Python', platform.python_version(),"
    " *(f'{name} {v(name)}' for name in ('jax', 'jaxlib', 'numpy', 'optree')))"
)


@dataclass(frozen=True)
class Interpreter:
    """A Python that was seen to run."""

    version: str
    path: Path


@dataclass(frozen=True)
class Row:
    """One row of the matrix: an interpreter, and what pip is told beside the package itself."""

    name: str
    interpreter: Interpreter
    pip_arguments: tuple[str, ...]

    @property
    def environment(self) -> Path:
        """The folder of this row's virtual environment."""
        return ENVIRONMENTS / f"{self.name}-py{self.interpreter.version}"

    @property
    def python(self) -> Path:
        """The interpreter inside the environment."""
        return self.environment / "bin" / "python"


def pyenv_roots() -> Iterator[Path]:
    """Yield the folders in which pyenv may keep its versions."""
    if root := os.environ.get("PYENV_ROOT"):
        yield Path(root)
    if pyenv := shutil.which("pyenv"):
        answer = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            yield Path(answer.stdout.strip())
        # Under another HOME `pyenv root` names a folder that is not there; the program lies in the real one.
        yield Path(pyenv).resolve().parent.parent
    yield Path.home() / ".pyenv"


def newest_first(folders: Iterator[Path]) -> list[Path]:
    """Sort pyenv's folders by patch number: 3.11.10 before 3.11.9. Builds such as 3.13.0t are left out."""
    patches = {folder: folder.name.rpartition(".")[2] for folder in folders}
    plain = [folder for folder, patch in patches.items() if patch.isdigit()]
    return sorted(plain, key=lambda folder: int(patches[folder]), reverse=True)


def candidates(version: str) -> Iterator[Path]:
    """Yield the places where an interpreter of this version may be."""
    name = f"python{version}"
    for folder in os.get_exec_path():
        yield Path(folder) / name
    for root in pyenv_roots():
        for folder in newest_first(root.glob(f"versions/{version}.*")):
            yield folder / "bin" / name


def runs(path: Path, version: str) -> bool:
    """Say whether the file is an interpreter of this version that can make environments.

    A pyenv shim exists for each version that pyenv has, and fails unless that version is switched on.
    """
    question = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    if not os.access(path, os.X_OK):
        return False
    answer = subprocess.run([path, "-c", question], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() == version


def find_interpreters() -> list[Interpreter]:
    """Find one working interpreter of each version, oldest first, and print what was found."""
    found = []
    for version in VERSIONS:
        path = next((path for path in candidates(version) if runs(path, version)), None)
        print(f"Python {version}: {path or 'not found'}")
        if path is not None:
            found.append(Interpreter(version, path))
    return found


def lower_bounds() -> tuple[str, ...]:
    """Return pyproject's dependencies, each pinned to its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return tuple(dependency.replace(">=", "==") for dependency in project["dependencies"])


def matrix(found: list[Interpreter]) -> tuple[Row, Row]:
    """Pair the oldest interpreter with the oldest versions, and the newest with the newest."""
    upgrade = ("--upgrade", "--upgrade-strategy", "eager")
    return Row("oldest", found[0], lower_bounds()), Row("newest", found[-1], upgrade)


def install(row: Row) -> None:
    """Make the row's environment, afresh, and install batchrules with what its tests need."""
    subprocess.run([row.interpreter.path, "-m", "venv", "--clear", row.environment], check=True)
    pip = [row.python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-e", ".[test]", *row.pip_arguments], cwd=ROOT, check=True)


def passes(row: Row, pytest_arguments: list[str]) -> bool:
    """Run the test-suite in the row's environment."""
    print(f"\n--- {row.name}: setting up {row.environment.relative_to(ROOT)}", flush=True)
    install(row)
    subprocess.run([row.python, "-c", REPORT], cwd=ROOT, check=True)
    tests = subprocess.run([row.python, "-m", "pytest", "-q", *pytest_arguments], cwd=ROOT, check=False)
    return tests.returncode == 0


def main(pytest_arguments: list[str]) -> int:
    """Run every row, the second one also if the first fails."""
    found = find_interpreters()
    if not found:
        print(f"None of Python {', '.join(VERSIONS)} was found on PATH or in pyenv: nothing to test on.")
        return 1
    outcomes = {row.name: passes(row, pytest_arguments) for row in matrix(found)}
    print("\n" + ", ".join(f"{name}: {'passed' if ok else 'FAILED'}" for name, ok in outcomes.items()))
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
