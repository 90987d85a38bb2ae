"""A small plot of series of points, without a plotting library."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

WIDTH, HEIGHT, MARGIN, LEGEND = 340, 240, 36, 66
SMALLEST, LARGEST = 3.0, 90.0
TICKS = (4, 8, 16, 32, 64)
GOAL = 0.85


@dataclass(frozen=True, slots=True)
class Series:
    """Points (bytes per token and head, recall, name) of one colour, joined by lines or else named."""

    name: str
    colour: str
    points: list[tuple[float, float, str]]
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """Series and the recall of random chunks."""

    title: str
    series: list[Series]
    floor: float


def draw(panels: list[Panel], legend: list[tuple[str, str]], path: Path, columns: int = 3) -> None:
    """Write the panels as one SVG under a ``legend`` of (name, colour)."""
    height = LEGEND + -(-len(panels) // columns) * HEIGHT
    body = [f'<rect width="{columns * WIDTH}" height="{height}" fill="white"/>', *_legend(legend, columns)]
    body += [_panel(p, (i % columns) * WIDTH, LEGEND + (i // columns) * HEIGHT) for i, p in enumerate(panels)]
    size = f'viewBox="0 0 {columns * WIDTH} {height}" width="{columns * WIDTH}" height="{height}"'
    style = "text{font:10px sans-serif} .t{font-size:12px;font-weight:bold} .s{font-size:8px;fill:#555}"
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(body)}</svg>\n')


def _legend(names: list[tuple[str, str]], columns: int) -> list[str]:
    shown = "recall of the exactly chosen chunks, against bytes per token and KV head (log); red line:"
    parts = [
        f'<text x="12" y="16">{shown} {GOAL:g}; dashed: random chunks; a point names itself under the pointer</text>'
    ]
    for i, (name, colour) in enumerate(names):
        x, y = 18 + i % 4 * (columns * WIDTH // 4), 34 + i // 4 * 16
        parts.append(f'<circle cx="{x}" cy="{y - 3}" r="4" fill="{colour}"/><text x="{x + 8}" y="{y}">')
        parts.append(f"{escape(name)}</text>")
    return parts


def _panel(panel: Panel, left: float, top: float) -> str:
    def x(nbytes: float) -> float:
        share = math.log(nbytes / SMALLEST) / math.log(LARGEST / SMALLEST)
        return left + MARGIN + min(max(share, 0.0), 1.0) * (WIDTH - 1.5 * MARGIN)

    def y(recall: float) -> float:
        return top + HEIGHT - MARGIN + 8 - recall * (HEIGHT - 2 * MARGIN + 8)

    parts = [f'<text class="t" x="{left + MARGIN}" y="{top + 20}">{escape(panel.title)}</text>']
    for tick in (0.0, 0.25, 0.5, 0.75, GOAL, 1.0):
        colour = "#d62728" if tick == GOAL else "#dddddd"
        parts.append(_line(x(SMALLEST), y(tick), x(LARGEST), y(tick), colour))
        if tick != GOAL:
            parts.append(f'<text x="{left + 10}" y="{y(tick) + 3:.1f}">{tick:g}</text>')
    for size in TICKS:
        parts.append(f'<text x="{x(size) - 4:.1f}" y="{y(0) + 14:.1f}">{size}</text>')
    parts.append(_line(x(SMALLEST), y(panel.floor), x(LARGEST), y(panel.floor), "#555555", ' stroke-dasharray="4 3"'))
    for series in panel.series:
        parts += _series(series, x, y)
    return "".join(parts)


def _series(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    points = sorted(series.points)
    parts = []
    if series.joined:
        for (b1, r1, _), (b2, r2, _) in pairwise(points):
            parts.append(_line(x(b1), y(r1), x(b2), y(r2), series.colour))
    last = 0.0
    for nbytes, recall, name in points:
        at = f'cx="{x(nbytes):.1f}" cy="{y(recall):.1f}"'
        title = f"<title>{escape(name)}: {nbytes:.2f} B, {recall:.3f}</title>"
        parts.append(f'<circle {at} r="3" fill="{series.colour}">{title}</circle>')
        if not series.joined:
            side = 'text-anchor="end" x="{:.1f}"' if nbytes > LARGEST / 2 else 'x="{:.1f}"'
            place = side.format(x(nbytes) + (-5 if nbytes > LARGEST / 2 else 5))
            down = -3 if nbytes == last else 8  # two at the same bytes: the higher one's name goes up
            parts.append(f'<text class="s" {place} y="{y(recall) + down:.1f}">{escape(name)}</text>')
        last = nbytes
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'
