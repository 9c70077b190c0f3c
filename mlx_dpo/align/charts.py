"""Line charts as SVG: a title, two axes with a few round numbers, one line a series with its intervals."""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 460, 272
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 56, 48
_MOST_DOTS = 40  # a line of more points is drawn without them
_COLOURS = 4
_LETTER = 6.6  # width of a letter of the legend, as wide fonts have it
_SAME = 1e-4  # values that differ by less, of their size, are drawn as equal: their axis could not be written

STYLE = """
:root{--s0:#2a6f97;--s1:#b5533c;--s2:#5b7f3a;--s3:#7a5a9e}
@media(prefers-color-scheme:dark){:root{--s0:#6cb6dd;--s1:#eb9679;--s2:#a3c77d;--s3:#bfa3e0}}
svg .title{font:600 14px system-ui,sans-serif;fill:var(--ink)}
svg .tick{font:11.5px system-ui,sans-serif;fill:var(--soft)}
svg .grid{stroke:var(--line)}svg .zero{stroke:var(--soft);stroke-opacity:.6}
svg .s0{--own:var(--s0)}svg .s1{--own:var(--s1)}svg .s2{--own:var(--s2)}svg .s3{--own:var(--s3)}
svg polyline{fill:none;stroke:var(--own,var(--soft));stroke-width:1.8;stroke-linejoin:round}
svg .dot{fill:var(--own)}svg .whisker{stroke:var(--own);stroke-width:2;stroke-opacity:.55}
svg .back{stroke-width:1.4;stroke-dasharray:5 3;stroke-opacity:.7}svg .dot.back{fill-opacity:.7}
svg .mark{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:2 3;stroke-opacity:.75}
"""

Point = tuple[float, float]
Interval = tuple[float, float, float]


class Series(NamedTuple):
    """Points (x, y) with a name; `intervals` (x, low, high) stand about them, `taken_back` are paler lines beside.

    What is not finite is left out.
    """

    name: str
    points: Sequence[Point]
    intervals: Sequence[Interval] = ()
    taken_back: Sequence[Sequence[Point]] = ()

    def finite(self) -> "Series":
        """The series without what cannot be drawn."""
        return Series(
            self.name,
            [p for p in self.points if math.isfinite(p[1])],
            [i for i in self.intervals if math.isfinite(i[1]) and math.isfinite(i[2])],
            [line for attempt in self.taken_back if (line := [p for p in attempt if math.isfinite(p[1])])],
        )


class _Frame(NamedTuple):
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def about(cls, series: Sequence[Series], within: Sequence[float], over: Sequence[float]) -> "_Frame":
        points = [point for s in series for line in (s.points, *s.taken_back) for point in line]
        ends = [(x, y) for s in series for x, low, high in s.intervals for y in (low, high)]
        xs, ys = zip(*points, *ends, strict=True)
        x_low, x_high = min([*xs, *over]), max([*xs, *over])
        if x_low == x_high:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        return cls(x_low, x_high, *_span([*ys, *within]))

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _RIGHT - _LEFT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _BOTTOM - _TOP)


def line_chart(
    title: str,
    series: Sequence[Series],
    unit: str = "",
    within: Sequence[float] = (),
    over: Sequence[float] = (),
    rescues: Sequence[float] = (),
) -> str:
    """An SVG picture of `series` over whole steps; the y axis takes in the values `within`, the x axis those `over`.

    `rescues` are steps that get an upright line. Empty where no series has a point. Its colours and fonts are in STYLE.
    """
    drawn = [(number % _COLOURS, s) for number, s in enumerate(s.finite() for s in series) if s.points or s.taken_back]
    if not drawn:
        return ""
    frame = _Frame.about([s for _, s in drawn], within, [*over, *rescues])
    label = html.escape(f"{title}: {', '.join(s.name for _, s in drawn)}")
    return "".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">',
            f'<text class="title" x="14" y="22">{html.escape(title)}</text>',
            f'<text class="tick" x="14" y="39">{html.escape(unit)}</text>' if unit else "",
            *_axes(frame),
            *(_upright(frame.x(step), _TOP - 4, _HEIGHT - _BOTTOM) for step in rescues),
            *(f'<g class="s{colour}">{"".join(_lines(line, frame))}</g>' for colour, line in drawn),
            *_legend(drawn, bool(rescues)),
            "</svg>",
        ]
    )


def _axes(frame: _Frame) -> Iterator[str]:
    for y in _ticks(frame.y_low, frame.y_high, 0.0):
        at, kind = frame.y(y), "grid" if y else "zero"
        yield f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_written(y)}</text>'
    below = _HEIGHT - _BOTTOM + 18
    for x in _ticks(frame.x_low, frame.x_high, 1.0):
        yield f'<text class="tick" x="{frame.x(x):.1f}" y="{below}" text-anchor="middle">{x:.0f}</text>'
    yield f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 11}" text-anchor="end">step</text>'


def _written(value: float) -> str:
    return f"{value:g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")


def _lines(line: Series, frame: _Frame) -> Iterator[str]:
    for attempt in line.taken_back:
        yield _polyline(attempt, frame, ' class="back"')
        if len(attempt) == 1:
            yield from _dots(attempt, frame, 2.6, "dot back")
    for x, low, high in line.intervals:
        yield _upright(frame.x(x), frame.y(low), frame.y(high), "whisker")
    if line.points:
        yield _polyline(line.points, frame)
    if len(line.points) <= _MOST_DOTS:
        yield from _dots(line.points, frame, 4 if len(line.points) == 1 else 2.6, "dot")


def _polyline(points: Sequence[Point], frame: _Frame, kind: str = "") -> str:
    return f'<polyline{kind} points="{" ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)}"/>'


def _dots(points: Sequence[Point], frame: _Frame, radius: float, kind: str) -> Iterator[str]:
    for x, y in points:
        yield f'<circle class="{kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}"/>'


def _upright(x: float, y1: float, y2: float, kind: str = "mark") -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _legend(drawn: Sequence[tuple[int, Series]], rescued: bool) -> Iterator[str]:
    """What each line is, below the axis; nothing where the first is alone."""
    x, y = 14.0, _HEIGHT - 15
    entries = [(f"s{colour}", line.name, '<circle class="dot" cx="0" cy="0" r="4"/>') for colour, line in drawn]
    if any(line.taken_back for _, line in drawn):
        entries.append(("sample", "taken back", '<polyline class="back" points="-7,0 7,0"/>'))
    if rescued:
        entries.append(("sample", "rescue", '<line class="mark" x1="0" x2="0" y1="-6" y2="6"/>'))
    if len(entries) == 1 and drawn[0][0] == 0:
        return
    for kind, name, sample in entries:
        yield f'<g class="{kind}" transform="translate({x + 6:.0f} {y})">{sample}'
        yield f'<text class="tick" x="12" y="4">{html.escape(name)}</text></g>'
        x += 38 + _LETTER * len(name)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= _SAME * max(abs(low), abs(high)):
        margin = max(abs(low), abs(high)) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float, least: float) -> list[float]:
    """Up to seven round numbers within a span, `least` or more apart."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw)))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    digits = 2 - math.floor(math.log10(step))
    return [round((first + i) * step, digits) for i in range(count)]
