"""Draw docs/methods.svg: what each method sends to the foreign function.

Run as `python docs/draw_methods.py`; it needs nothing but Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

OUTPUT = Path(__file__).with_name("methods.svg")

WIDTH, CELL, GAP, MARGIN = 448, 13, 8, 14
TITLE_HEIGHT, LABEL_HEIGHT, ROW_GAP = 24, 20, 20
ELEMENTS = ("#4c6ef5", "#12b886", "#f59f00", "#e64980")  # a colour for each element of x
SHARED = "#868e96"
INK, FRAME, PAPER = "#212529", "#adb5bd", "#ffffff"
SANS, MONO = "Roboto, Helvetica, Arial, sans-serif", "'Roboto Mono', Menlo, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Grid:
    """An array: a row of three cells for each colour."""

    rows: Sequence[str]
    shape: str

    @property
    def width(self) -> int:
        """As wide as its cells, or as its label."""
        return max(3 * CELL, 8 * len(self.shape))


@dataclass(frozen=True)
class Line:
    """A method, and the calls that it makes: each is what `x` and `w` are there."""

    title: str
    note: str
    calls: Sequence[tuple[Grid, Grid]]


X, W = Grid(ELEMENTS, "(4, 3)"), Grid((SHARED,), "(3,)")
LINES = (
    Line("jax.vmap is given", "x is mapped, w is not", [(X, W)]),
    Line('"sequential"', "four calls", [(Grid((colour,), "(3,)"), W) for colour in ELEMENTS]),
    Line('"expand_dims"', "one call, nothing copied", [(X, Grid((SHARED,), "(1, 3)"))]),
    Line('"broadcast_all"', "one call, w repeated", [(X, Grid((SHARED,) * 4, "(4, 3)"))]),
    Line('"legacy_vectorized"', "one call, w as it is", [(X, W)]),
    Line(
        '"expand_dims", batch_size=2',
        "two calls",
        [(Grid(half, "(2, 3)"), Grid((SHARED,), "(1, 3)")) for half in (ELEMENTS[:2], ELEMENTS[2:])],
    ),
)


def text(place: tuple[float, float], words: str, size: int, *, font: str = SANS, more: str = "") -> str:
    """One line of text."""
    x, y = place
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<text x="{x}" y="{y}" font-family="{font}" font-size="{size}" fill="{INK}"{more}>{escaped}</text>'


def cells(grid: Grid, x: float, y: float) -> Iterator[str]:
    """The cells of an array, and its shape under them."""
    left = x + (grid.width - 3 * CELL) / 2
    for row, colour in enumerate(grid.rows):
        for column in range(3):
            place = f'x="{left + column * CELL}" y="{y + row * CELL}" width="{CELL - 1}" height="{CELL - 1}"'
            yield f'<rect {place} rx="2" fill="{colour}"/>'
    below = y + len(grid.rows) * CELL + LABEL_HEIGHT - 6
    yield text((x + grid.width / 2, below), grid.shape, 12, font=MONO, more=' text-anchor="middle"')


def call(pair: tuple[Grid, Grid], x: float, y: float) -> tuple[list[str], float]:
    """A frame with both arrays in it, and how wide it is."""
    width = GAP + sum(grid.width + GAP for grid in pair)
    height = max(len(grid.rows) for grid in pair) * CELL + LABEL_HEIGHT + GAP
    drawn = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="none" stroke="{FRAME}"/>',
        *cells(pair[0], x + GAP, y + GAP),
        *cells(pair[1], x + 2 * GAP + pair[0].width, y + GAP),
    ]
    return drawn, width


def line(of: Line, y: float) -> tuple[list[str], float]:
    """A method with its calls side by side, and where the next one starts."""
    drawn = [
        text((MARGIN, y + 14), of.title, 14, more=' font-weight="bold"'),
        text((WIDTH - MARGIN, y + 14), of.note, 13, more=' text-anchor="end"'),
    ]
    x = float(MARGIN)
    for pair in of.calls:
        frame, width = call(pair, x, y + TITLE_HEIGHT)
        drawn += frame
        x += width + 4
    rows = max(len(grid.rows) for pair in of.calls for grid in pair)
    return drawn, y + TITLE_HEIGHT + rows * CELL + LABEL_HEIGHT + GAP + ROW_GAP


def svg() -> str:
    """The whole picture."""
    drawn: list[str] = []
    y = float(MARGIN)
    for of in LINES:
        parts, y = line(of, y)
        drawn += parts
    height = y - ROW_GAP + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">'
    paper = f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, paper, *drawn, "</svg>", ""])


if __name__ == "__main__":
    OUTPUT.write_text(svg(), encoding="utf-8")
