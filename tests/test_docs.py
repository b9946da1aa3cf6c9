r"""Run the code of README.md and docs/*.md, page by page, as a reader would.

The ```python blocks of a page run one after the other in one namespace, in a fresh interpreter with JAX's
defaults. A comment directly above a block says what is special about it:

    <!-- not run: reason -->    above a ```python block: it is not run, for that reason
    <!-- output -->             above a ```text block: exactly what the ```python block before it prints
                                ("..." stands for anything)

`python tests/test_docs.py README.md` runs one page by itself.
"""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^`]*)$")
COMMENT = re.compile(r"^\s*<!--\s*(?P<kind>not run|output)\b(?P<rest>.*?)-->\s*$")
# Under these names a block looks the same to the reader, and would never run.
UNTESTED_NAMES = {"py", "python3", "pycon", "ipython"}


class DocsError(Exception):
    """A page is not written as this file's docstring says, or its code does not do what it shows."""


@dataclass(frozen=True)
class Fence:
    """A fenced block as it stands on the page."""

    line: int  # of its first line of text, from 1
    language: str
    text: str
    kind: str  # of the comment directly above: "not run", "output" or ""
    reason: str


@dataclass(frozen=True)
class Block:
    """A python block to run, and the output that the page shows for it."""

    line: int
    code: str
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
    if fence.kind == "not run" and fence.language != "python":
        raise DocsError(f"line {fence.line}: `not run` is for python blocks, this is {fence.language!r}")
    if fence.kind == "not run" and not fence.reason:
        raise DocsError(f"line {fence.line}: say why: <!-- not run: reason -->")
    if fence.kind == "output" and fence.language != "text":
        raise DocsError(f"line {fence.line}: `output` is for text blocks, this is {fence.language!r}")


def blocks(page_text):
    """Return the python blocks of a page that run, in order."""
    running, previous = [], None
    for fence in fences(page_text):
        check(fence)
        if fence.kind == "output":
            if previous is None or previous.kind == "not run" or running[-1].output is not None:
                raise DocsError(f"line {fence.line}: no python block that runs stands before this output")
            running[-1] = replace(running[-1], output=fence.text)
        elif fence.language == "python":
            previous = fence
            if fence.kind != "not run":
                running.append(Block(fence.line, fence.text))
    return running


def run_block(block, filename, namespace):
    """Run one block. A traceback through it has the page's name and line numbers."""
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
        run_block(block, str(page), namespace)


def run_in_fresh_interpreter(page, folder):
    """Run a page in `folder`, so that what its code writes stays out of the repository."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", __file__, page],
        env={**os.environ, "PYTHONPATH": search_path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_page(page, tmp_path):
    run = run_in_fresh_interpreter(page, tmp_path)
    assert run.returncode == 0, f"{page.relative_to(ROOT)}:\n{run.stderr}"


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- not run -->\n```python\nx = 1\n```\n", "line 3: say why"),
        ("<!-- not run: -->\n```python\nx = 1\n```\n", "line 3: say why"),
        ("<!-- not run: a reason -->\n```text\nx\n```\n", "line 3: `not run` is for python blocks"),
        ("<!-- output -->\n```python\nx = 1\n```\n", "line 3: `output` is for text blocks"),
        ("<!-- output -->\n```text\nx\n```\n", "line 3: no python block that runs"),
        ("```py\nx = 1\n```\n", "line 2: call this language `python`"),
        ("```python\nx = 1\n", "line 1: this fence is never closed"),
    ],
)
def test_a_page_written_otherwise_is_an_error(text, message):
    with pytest.raises(DocsError, match=message):
        blocks(text)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).resolve())
