"""Line charts as SVG: a title, two axes with a few round numbers, one line a series."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 34
_COLOURS = ("#2f6f8f", "#b5533c", "#5b7f3a", "#7a5a9e")


class Series(NamedTuple):
    """Points (x, y) with a name; points whose y is not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, series: Sequence[Series], unit: str) -> str:
    """An SVG picture of `series` over steps; empty where no series has a point."""
    series = [Series(s.name, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    points = [point for s in series for point in s.points]
    if not points:
        return ""
    x_low, x_high = _span([x for x, _ in points])
    y_low, y_high = _span([y for _, y in points])
    label = html.escape(f"{title}: {', '.join(s.name for s in series)}")
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">',
        f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>',
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="16" text-anchor="end">{html.escape(unit)}</text>',
    ]
    for y in _ticks(y_low, y_high):
        at = _place(y, y_low, y_high, _HEIGHT - _BOTTOM, _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(x_low, x_high):
        at = _place(x, x_low, x_high, _LEFT, _WIDTH - _RIGHT)
        parts.append(f'<text class="tick" x="{at:.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{x:g}</text>')
    for number, line in enumerate(series):
        parts.append(_line(number, line, (x_low, x_high, y_low, y_high)))
    parts.append(_legend(series))
    return "".join(parts) + "</svg>"


def _line(number: int, line: Series, spans: tuple[float, float, float, float]) -> str:
    x_low, x_high, y_low, y_high = spans
    colour = _COLOURS[number % len(_COLOURS)]
    places = [
        (_place(x, x_low, x_high, _LEFT, _WIDTH - _RIGHT), _place(y, y_low, y_high, _HEIGHT - _BOTTOM, _TOP))
        for x, y in line.points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>' for x, y in places)
    drawn = f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>'
    return drawn + (dots if len(places) <= 40 else "")


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    width = (_WIDTH - _LEFT) / len(series)
    return "".join(
        f'<text class="tick" x="{_LEFT + i * width:.0f}" y="{_HEIGHT - 2}" fill="{_COLOURS[i % len(_COLOURS)]}">'
        f"■ {html.escape(line.name)}</text>"
        for i, line in enumerate(series)
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within a span."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low) * (end - start)
