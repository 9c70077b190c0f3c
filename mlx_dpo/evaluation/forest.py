"""A forest plot: differences with their intervals, one below the other, around the line of none."""

import html
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, _ROW, _LEFT, _RIGHT = 920, 24, 310, 210
STYLE = """
.forest{background:var(--card);border:1px solid var(--line);border-radius:8px;width:100%;height:auto;margin:6px 0}
.forest text{fill:var(--ink);font-size:13px}.forest .soft{fill:var(--soft)}
.forest line{stroke:var(--soft)}.forest .zero{stroke-dasharray:3 3}
.forest .yes *{stroke:var(--mend);fill:var(--mend)}.forest .no *{stroke:var(--warn);fill:var(--warn)}
.forest .unclear *{stroke:var(--soft);fill:var(--soft)}
"""


class Line(NamedTuple):
    """One difference: what it is of, its mean and interval, and whether it is better (yes, no, unclear)."""

    name: str
    mean: float
    low: float
    high: float
    better: str


def forest(lines: Sequence[Line], title: str) -> str:
    """The plot as an SVG picture; all lines share one scale."""
    most = max(max(abs(line.low), abs(line.high)) for line in lines) or 1.0
    height = _ROW * (len(lines) + 2)
    middle, half = (_LEFT + WIDTH - _RIGHT) / 2, (WIDTH - _RIGHT - _LEFT) / 2 - 10

    def x(value: float) -> float:
        return round(middle + half * value / most, 1)

    parts = [
        f'<svg class="forest" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">',
        f'<text x="12" y="{_ROW - 6}" font-weight="600">{html.escape(title)}</text>',
        f'<line class="zero" x1="{middle}" x2="{middle}" y1="{_ROW}" y2="{height - _ROW}"/>',
    ]
    for number, line in enumerate(lines):
        y = _ROW * (number + 1.5)
        parts.append(
            f'<text x="12" y="{y + 4}">{html.escape(line.name)}</text><g class="{line.better}">'
            f'<line stroke-width="2" x1="{x(line.low)}" x2="{x(line.high)}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(line.mean)}" cy="{y}" r="4"/></g>'
            f'<text class="soft" x="{WIDTH - _RIGHT + 6}" y="{y + 4}">{line.mean:+.3g} '
            f"({line.low:+.2g}, {line.high:+.2g})</text>"
        )
    parts.append(f'<text class="soft" x="{middle}" y="{height - 7}" text-anchor="middle">0</text></svg>')
    return "".join(parts)
