"""Weights over a text as an SVG, without a plotting library."""

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

COLUMNS = 240
"""Of a map, at most: several chunks share one where there are more."""
CELL, LEFT, TOP, MOST_HEIGHT = 3.5, 96, 46, 320
SHADES = ("#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
"""From little weight to the most of a map, each three times the one before."""


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One row for each label."""

    title: str
    labels: list[str]
    weights: npt.NDArray[np.float32]
    """[rows, chunks]"""


def draw(
    maps: list[Heatmap], marks: list[tuple[int, int, str]], sink: int, chunk: int, path: str | os.PathLike[str]
) -> None:
    """Write the maps below each other, chunks from left to right, under the ``marks`` (first token, end, name)."""
    n_chunks = maps[0].weights.shape[1]
    per_column = max(1, -(-n_chunks // COLUMNS))
    width = max(1, -(-n_chunks // per_column)) * CELL
    body, top = [], float(TOP)
    for begin, end, name in marks:
        x = LEFT + (begin - sink) / chunk / per_column * CELL
        wide = max(1.0, (end - begin) / chunk / per_column * CELL)
        body.append(f'<rect x="{x:.1f}" y="{TOP - 8}" width="{wide:.1f}" height="4" fill="#d62728"/>')
        body.append(f'<text x="{x:.1f}" y="{TOP - 11}" fill="#d62728">{escape(name)}</text>')
    for each in maps:
        height = max(1.0, min(12.0, MOST_HEIGHT / max(1, len(each.labels))))
        body += _rows(each, per_column, top, height, width)
        top += height * len(each.labels) + 16
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        token = sink + round(share * n_chunks) * chunk
        body.append(f'<text x="{LEFT + share * width:.1f}" y="{top}" text-anchor="middle">{token}</text>')
    body.append(f'<text x="8" y="{top}">token</text><text x="8" y="14">{_caption()}</text>')
    size = f'viewBox="0 0 {LEFT + width + 40:.0f} {top + 12:.0f}"'
    style = "<style>text{font:10px sans-serif}</style>"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}<rect width="100%" height="100%" fill="white"/>'
    Path(path).write_text(f"{svg}{''.join(body)}</svg>\n", encoding="utf-8")


def _caption() -> str:
    return "weight of what was attended to: the darkest is the most of a map, each lighter shade a third; red: cited"


def _rows(each: Heatmap, per_column: int, top: float, height: float, width: float) -> list[str]:
    """One path for each shade: a cell is a few characters in it."""
    n_rows, n_chunks = each.weights.shape
    padded = np.pad(each.weights, ((0, 0), (0, -n_chunks % per_column)))
    cells = padded.reshape(n_rows, -1, per_column).sum(axis=2)
    most = float(cells.max()) if cells.size else 0.0
    frame = f'x="{LEFT}" y="{top:.1f}" width="{width:.1f}" height="{height * n_rows:.1f}"'
    parts = [f'<rect {frame} fill="#f7fbff"/>', f'<text x="8" y="{top + 10:.1f}">{escape(each.title)}</text>']
    with np.errstate(divide="ignore"):
        shade = len(SHADES) - 1 + np.ceil(np.log(cells / most) / np.log(3.0)) if most else np.full(cells.shape, -1.0)
    for number, colour in enumerate(SHADES):
        at = np.argwhere(shade == number).tolist()
        if at:
            cell = f"h{CELL}v{height:.1f}h-{CELL}z"
            d = "".join(f"M{LEFT + column * CELL:.1f} {top + row * height:.1f}{cell}" for row, column in at)
            parts.append(f'<path fill="{colour}" d="{d}"/>')
    step = max(1, round(12 / height))
    for row in range(0, n_rows, step):
        y = top + row * height + min(height, 10)
        parts.append(f'<text x="{LEFT - 4}" y="{y:.1f}" text-anchor="end">{escape(each.labels[row])}</text>')
    return parts
