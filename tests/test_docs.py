r"""Run the code of README.md and docs/*.md, page by page, as a reader would.

The ```python blocks of a page run one after the other in one namespace, in a fresh interpreter with JAX's
defaults. A comment directly above a block says what is special about it:

    <!-- not run: reason -->    above a ```python block: it is not run, for that reason
    <!-- needs: a.b.Name -->    above a ```python block: it is run where this name can be imported
    <!-- file: name.py -->      above a ```python block: it is written to that file, which later blocks may use
    <!-- output -->             above a ```text block: exactly what the ```python block before it prints
                                ("..." stands for anything)

`python tests/test_docs.py README.md` runs one page by itself. A page that starts processes (it says `__main__`) is run
as a script too, all of its blocks in one file: workers import that file, as they would a reader's.
"""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^`]*)$")
COMMENT = re.compile(r"^\s*<!--\s*(?P<kind>not run|needs|file|output)\b(?P<rest>.*?)-->\s*$")
# Under these names a block looks the same to the reader, and would never run.
UNTESTED_NAMES = {"py", "python3", "pycon", "ipython"}


# With attributes (a title) a block is not run as it stands; so it must be a file that `make examples` runs.
EXAMPLE = re.compile(r'--8<-- "examples/\w+\.py"\n')


def name_of(page):
    return page.relative_to(ROOT).as_posix()


class DocsError(Exception):
    """A page is not written as this file's docstring says, or its code does not do what it shows."""


@dataclass(frozen=True)
class Fence:
    """A fenced block as it stands on the page."""

    line: int  # of its first line of text, from 1
    language: str
    text: str
    kind: str  # of the comment directly above: "not run", "needs", "file", "output" or ""
    reason: str  # what that comment says after the colon


@dataclass(frozen=True)
class Block:
    """A python block to run, or to write to a file, and the output that the page shows for it."""

    line: int
    code: str
    needs: str = ""
    file: str = ""
    output: str | None = None


def read_comment(lines, opening):
    """Return kind and reason of the comment directly above the fence that opens at this index."""
    above = next((line for line in reversed(lines[:opening]) if line.strip()), "")
    comment = COMMENT.match(above)
    if comment is None:
        return "", ""
    return comment["kind"], comment["rest"].strip().removeprefix(":").strip()


def find_closing(lines, opening, ticks):
    for index in range(opening + 1, len(lines)):
        if re.fullmatch(rf"\s*{ticks}`*\s*", lines[index]):
            return index
    raise DocsError(f"line {opening + 1}: this fence is never closed")


def fences(page_text):
    """Return every fenced block of a page."""
    lines = page_text.splitlines()
    found, index = [], 0
    while index < len(lines):
        if fence := FENCE.match(lines[index]):
            closing = find_closing(lines, index, fence["ticks"])
            text = "".join(line.removeprefix(fence["indent"]) + "\n" for line in lines[index + 1 : closing])
            kind, reason = read_comment(lines, index)
            found.append(Fence(index + 2, fence["language"].strip(), text, kind, reason))
            index = closing
        index += 1
    return found


def check(fence):
    """Raise where a fence and the comment above it do not fit together."""
    if fence.language.lower() in UNTESTED_NAMES:
        raise DocsError(f"line {fence.line}: call this language `python`, or the block is never run")
    if fence.language.startswith("{") and not EXAMPLE.fullmatch(fence.text):
        raise DocsError(f"line {fence.line}: only a file of examples/ may stand in a block with attributes")
    if fence.kind in ("not run", "needs", "file") and fence.language != "python":
        raise DocsError(f"line {fence.line}: `{fence.kind}` is for python blocks, this is {fence.language!r}")
    if fence.kind == "not run" and not fence.reason:
        raise DocsError(f"line {fence.line}: say why: <!-- not run: reason -->")
    if fence.kind == "needs" and not re.fullmatch(r"\w+(\.\w+)*", fence.reason):
        raise DocsError(f"line {fence.line}: say what: <!-- needs: module.Name -->")
    if fence.kind == "file" and not re.fullmatch(r"\w+\.\w+", fence.reason):
        raise DocsError(f"line {fence.line}: say which, in this folder: <!-- file: name.py -->")
    if fence.kind == "output" and fence.language != "text":
        raise DocsError(f"line {fence.line}: `output` is for text blocks, this is {fence.language!r}")


def blocks(page_text):
    """Return the python blocks of a page that run, in order."""
    running, previous = [], None
    for fence in fences(page_text):
        check(fence)
        if fence.kind == "output":
            if previous is None or previous.kind in ("not run", "file") or running[-1].output is not None:
                raise DocsError(f"line {fence.line}: no python block that runs stands before this output")
            running[-1] = replace(running[-1], output=fence.text)
        elif fence.language == "python":
            previous = fence
            if fence.kind != "not run":
                more = {fence.kind: fence.reason} if fence.kind in ("needs", "file") else {}
                running.append(Block(fence.line, fence.text, **more))
    return running


def importable(name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def run_block(block, filename, namespace):
    """Run one block. A traceback through it has the page's name and line numbers."""
    if block.file:
        Path(block.file).write_text(block.code, encoding="utf-8")
        return
    code = compile("\n" * (block.line - 1) + block.code, filename, "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)  # noqa: S102 (running the page's code is what this file is for)
    if block.output is None:
        return
    checker, example = doctest.OutputChecker(), doctest.Example(block.code, block.output)
    if not checker.check_output(block.output, printed.getvalue(), doctest.ELLIPSIS):
        difference = checker.output_difference(example, printed.getvalue(), doctest.REPORT_UDIFF)
        raise DocsError(f"line {block.line}: this block prints something else\n{difference}")


def run_page(page):
    namespace = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if not block.needs or importable(block.needs):
            run_block(block, str(page), namespace)


def as_script(page, folder):
    """Put a page into one file, as a reader would who copies block after block, and return that file."""
    text = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.file:
            (folder / block.file).write_text(block.code, encoding="utf-8")
        elif not block.needs or importable(block.needs):
            text += block.code + "\n\n"
    script = folder / f"{page.stem}.py"
    script.write_text(text, encoding="utf-8")
    return script


def run_in_fresh_interpreter(page, folder):
    return run_python(["-W", "error::DeprecationWarning", __file__, page], folder)


def run_python(arguments, folder):
    """Run Python in `folder`, so that what a page's code writes stays out of the repository."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": search_path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page(page, tmp_path):
    run = run_in_fresh_interpreter(page, tmp_path)
    assert run.returncode == 0, f"{name_of(page)}:\n{run.stderr}"


STARTS_PROCESSES = [page for page in PAGES if "__main__" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", STARTS_PROCESSES, ids=name_of)
def test_page_as_a_script(page, tmp_path):
    run = run_python([as_script(page, tmp_path)], tmp_path)
    assert run.returncode == 0, f"{name_of(page)}:\n{run.stderr}"


PAGE = """Text.

```python
x = 1
```

```python
print(x + 1)
```

Prints:

<!-- output -->
```text
{output}
```
"""


@pytest.mark.parametrize("output", ["2", "..."])
def test_blocks_of_a_page_share_names(tmp_path, output):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(output=output), encoding="utf-8")
    run_page(page)


def test_another_output_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(output="3"), encoding="utf-8")
    message = "line 8: this block prints something else\nExpected:\n    3\nGot:\n    2\n"
    with pytest.raises(DocsError, match=message):
        run_page(page)


def test_an_error_names_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\n1 / 0\n```\n", encoding="utf-8")
    run = run_in_fresh_interpreter(page, tmp_path)
    assert run.returncode == 1
    assert f'File "{page}", line 5' in run.stderr
    assert "ZeroDivisionError" in run.stderr


def test_a_block_with_a_reason_is_not_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a server -->\n```python\n1 / 0\n```\n", encoding="utf-8")
    run_page(page)


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.Name", "json.no_such_name"])
def test_a_block_whose_needs_are_missing_is_not_run(tmp_path, name):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- needs: {name} -->\n```python\n1 / 0\n```\n", encoding="utf-8")
    run_page(page)


def test_a_block_whose_needs_are_there_is_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- needs: json.JSONDecodeError -->\n```python\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        run_page(page)


def test_a_block_that_is_a_file_is_written_and_not_run(tmp_path):
    page = tmp_path / "page.md"
    reader = "assert open('made.py').read() == 'number = 3\\n'\nassert 'number' not in globals()"
    text = f"<!-- file: made.py -->\n```python\nnumber = 3\n```\n\n```python\n{reader}\n```\n"
    page.write_text(text, encoding="utf-8")
    run = run_in_fresh_interpreter(page, tmp_path)
    assert run.returncode == 0, run.stderr


def test_a_page_as_a_script_is_what_runs_in_one_file(tmp_path):
    page = tmp_path / "page.md"
    kept = "<!-- file: made.py -->\n```python\nnumber = 3\n```\n\n```python\nimport made\n```\n"
    left_out = "<!-- not run: a reason -->\n```python\n1 / 0\n```\n\n<!-- needs: no_such -->\n```python\n1 / 0\n```\n"
    page.write_text(f"{kept}\n{left_out}\n```python\nprint(__file__, made.number)\n```\n", encoding="utf-8")
    script = as_script(page, tmp_path)
    run = run_python([script], tmp_path)
    assert (run.returncode, run.stdout) == (0, f"{script} 3\n"), run.stderr


LINK = re.compile(r"\]\((?!\w+:)(?P<path>[^)#\s]+)")
# `mkdocs build --strict` checks the links of docs/.
FOLDERS = ("adapters/tesseract", "benchmarks", "examples")
OTHER_PAGES = ("README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in FOLDERS))


@pytest.mark.parametrize("page", OTHER_PAGES)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    assert not [link["path"] for link in LINK.finditer(text) if not (folder / link["path"]).exists()]


@pytest.mark.parametrize("module", ["batchrules", "batchrules.testing"])
def test_the_reference_has_each_public_name(module):
    public = importlib.import_module(module).__all__
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    listed = [line.removeprefix("::: ") for line in reference if line.startswith("::: ")]
    of_module = [name.rpartition(".")[2] for name in listed if name.rpartition(".")[0] == module]
    assert sorted(of_module) == sorted(public)


def test_the_drawing_of_the_methods_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "draw_methods.py"))
    assert (ROOT / "docs" / "methods.svg").read_text(encoding="utf-8") == script["svg"]()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- not run -->\n```python\nx = 1\n```\n", "line 3: say why"),
        ("<!-- not run: -->\n```python\nx = 1\n```\n", "line 3: say why"),
        ("<!-- not run: a reason -->\n```text\nx\n```\n", "line 3: `not run` is for python blocks"),
        ("<!-- needs: json -->\n```text\nx\n```\n", "line 3: `needs` is for python blocks"),
        ("<!-- needs -->\n```python\nx = 1\n```\n", "line 3: say what"),
        ("<!-- file: a/b.py -->\n```python\nx = 1\n```\n", "line 3: say which"),
        ("<!-- needs: a reason -->\n```python\nx = 1\n```\n", "line 3: say what"),
        ("<!-- output -->\n```python\nx = 1\n```\n", "line 3: `output` is for text blocks"),
        ("<!-- output -->\n```text\nx\n```\n", "line 3: no python block that runs"),
        ("```py\nx = 1\n```\n", "line 2: call this language `python`"),
        ("```{.python}\nx = 1\n```\n", "line 2: only a file of examples/"),
        ("```python\nx = 1\n", "line 1: this fence is never closed"),
    ],
)
def test_a_page_written_otherwise_is_an_error(text, message):
    with pytest.raises(DocsError, match=message):
        blocks(text)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).resolve())
