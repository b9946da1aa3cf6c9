"""What the distribution promises: few imports, public names with documentation, types, public JAX only."""

import ast
import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import batchrules

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "batchrules"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "adapters").rglob("*.py"))]
CORE_DEPENDENCIES = {"jax", "jaxlib", "numpy", "optree"}
MAX_LINES = 400

NEWLY_IMPORTED = """
import sys
import jax, jaxlib, numpy, optree
before = set(sys.modules)
import batchrules
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(names - sys.stdlib_module_names))
"""


def relative(path):
    return path.relative_to(ROOT).as_posix()


def each(paths):
    """Parametrise a test over files, each named by its place in the repository."""
    return pytest.mark.parametrize("path", [pytest.param(path, id=relative(path)) for path in paths])


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_there_are_modules_to_check():
    assert PACKAGE / "__init__.py" in MODULES


def test_core_dependencies():
    names = {re.match(r"[\w-]+", dependency).group() for dependency in project()["dependencies"]}
    assert names == CORE_DEPENDENCIES


def test_import_loads_nothing_but_the_core_dependencies():
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    answer = subprocess.run(
        [sys.executable, "-c", NEWLY_IMPORTED],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert set(answer.stdout.split()) <= {"batchrules"} | CORE_DEPENDENCIES
    assert "batchrules" in answer.stdout.split()


def test_version_is_that_of_pyproject():
    assert batchrules.__version__ == project()["version"] == importlib.metadata.version("batchrules")


def test_all_is_sorted_and_without_repetition():
    assert list(batchrules.__all__) == sorted(set(batchrules.__all__))


@pytest.mark.parametrize("name", [name for name in batchrules.__all__ if not name.startswith("__")])
def test_public_name_has_a_docstring(name):
    documentation = getattr(batchrules, name).__doc__ or ""
    assert documentation.strip()
    # A dataclass without a docstring is given its own signature as one.
    assert not documentation.startswith(f"{name}(")


def test_type_marker_is_shipped():
    assert (importlib.resources.files("batchrules") / "py.typed").is_file()


@each(SOURCES)
def test_only_public_jax_names(path):
    assert "jax._src" not in path.read_text(encoding="utf-8")


@each(MODULES)
def test_no_assert_in_library_code(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert asserts == []


@each(MODULES)
def test_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@each(MODULES)
def test_module_is_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
