"""Line charts as SVG: a title, two axes with a few round numbers, one line a series."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 46
_MOST_DOTS = 40  # a line of more points is drawn without them
_COLOURS = 4

STYLE = """
:root{--s0:#2a6f97;--s1:#b5533c;--s2:#5b7f3a;--s3:#7a5a9e}
@media(prefers-color-scheme:dark){:root{--s0:#6cb6dd;--s1:#eb9679;--s2:#a3c77d;--s3:#bfa3e0}}
svg .title{font:600 13px system-ui,sans-serif;fill:var(--ink)}svg .tick{font:11px system-ui,sans-serif;fill:var(--soft)}
svg .grid{stroke:var(--line)}svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .s0{--own:var(--s0)}svg .s1{--own:var(--s1)}svg .s2{--own:var(--s2)}svg .s3{--own:var(--s3)}
svg polyline{stroke:var(--own)}svg .dot{fill:var(--own)}
"""


class Series(NamedTuple):
    """Points (x, y) with a name; points whose y is not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


class _Frame(NamedTuple):
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _RIGHT - _LEFT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _BOTTOM - _TOP)


def line_chart(title: str, series: Sequence[Series], unit: str = "", within: Sequence[float] = ()) -> str:
    """An SVG picture of `series` over whole steps; the y axis takes in the values `within`.

    Empty where no series has a point. Its colours and fonts are in STYLE.
    """
    series = [Series(s.name, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    points = [point for s in series for point in s.points]
    if not points:
        return ""
    frame = _Frame(*_span([x for x, _ in points]), *_span([y for _, y in points] + list(within)))
    label = html.escape(f"{title}: {', '.join(s.name for s in series)}")
    return "".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">',
            f'<text class="title" x="{_LEFT}" y="18">{html.escape(title)}</text>',
            f'<text class="tick" x="{_WIDTH - _RIGHT}" y="18" text-anchor="end">{html.escape(unit)}</text>',
            *_axes(frame),
            *(_line(number, line, frame) for number, line in enumerate(series)),
            *_legend(series),
            "</svg>",
        ]
    )


def _axes(frame: _Frame) -> list[str]:
    parts = []
    for y in _ticks(frame.y_low, frame.y_high, 0.0):
        at = frame.y(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    below = _HEIGHT - _BOTTOM + 18
    for x in _ticks(frame.x_low, frame.x_high, 1.0):
        parts.append(f'<text class="tick" x="{frame.x(x):.1f}" y="{below}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 10}" text-anchor="end">step</text>')
    return parts


def _line(number: int, line: Series, frame: _Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    radius = 4 if len(places) == 1 else 2.2
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in places)
    return f'<g class="s{number % _COLOURS}"><polyline points="{path}"/>{dots if len(places) <= _MOST_DOTS else ""}</g>'


def _legend(series: Sequence[Series]) -> list[str]:
    if len(series) < 2:
        return []
    width = (_WIDTH - _LEFT - _RIGHT - 40) / len(series)
    parts = []
    for number, line in enumerate(series):
        x = _LEFT + number * width
        parts.append(
            f'<g class="s{number % _COLOURS}"><circle class="dot" cx="{x + 4:.0f}" cy="{_HEIGHT - 14}" r="4"/>'
            f'<text class="tick" x="{x + 13:.0f}" y="{_HEIGHT - 10}">{html.escape(line.name)}</text></g>'
        )
    return parts


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float, least: float) -> list[float]:
    """Up to seven round numbers within a span, `least` or more apart."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw)))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]
