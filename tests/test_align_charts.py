"""Charts: whole, within their frame, and true to their numbers, whatever these are."""

import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pytest

from mlx_dpo.align.charts import Series, line_chart

Element = ElementTree.Element


def drawn(series: Sequence[Series], **more: Any) -> Element:
    return ElementTree.fromstring(line_chart("T", series, **more))


def places(line: Element) -> list[tuple[float, float]]:
    x_and_y = (point.split(",") for point in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in x_and_y]


def lines(chart: Element, kind: str | None = None) -> list[list[tuple[float, float]]]:
    """The lines of the series; those of the legend stand in groups of their own."""
    groups = [group for group in chart.iter("g") if "transform" not in group.attrib]
    return [places(line) for group in groups for line in group.iter("polyline") if line.get("class") == kind]


def uprights(chart: Element, kind: str) -> list[tuple[float, float, float]]:
    """x, y1 and y2 of the upright lines of a kind, without the legend's."""
    every = [line.attrib for line in chart.iter("line") if line.get("class") == kind]
    found = [tuple(float(line[name]) for name in ("x1", "x2", "y1", "y2")) for line in every]
    return [(x1, y1, y2) for x1, x2, y1, y2 in found if x1 == x2 and x1 > 0]


def left_of_the_axis(chart: Element) -> list[str]:
    return [text.text or "" for text in chart.iter("text") if text.get("text-anchor") == "end" and text.text != "step"]


def test_steps_on_the_axis_are_whole():
    for last in (1, 2, 3, 7, 32, 1000):
        chart = drawn([Series("s", [(step, step * 0.37) for step in range(1, last + 1)])])
        below = [text for text in chart.iter("text") if text.get("text-anchor") == "middle"]
        assert 1 <= len(below) <= 7
        assert all(re.fullmatch("[0-9]+", text.text or "") for text in below)


def test_a_line_goes_up_where_its_numbers_do():
    (line,) = lines(drawn([Series("s", [(1, -3.0), (2, 5.0), (3, 1.0)])]))
    (x1, y1), (x2, y2), (x3, y3) = line
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert (y3 - y1) / (y2 - y1) == pytest.approx(0.5, abs=0.01)  # 1 is half of the way from -3 to 5
    assert y2 < y1


def test_an_interval_stands_from_its_low_to_its_high_end():
    chart = drawn([Series("s", [(1, 0.0), (2, 4.0), (3, 8.0)], intervals=[(2, 2.0, 8.0)])])
    (line,) = lines(chart)
    ((x, low, high),) = uprights(chart, "whisker")
    (_, zero), (at, four), (_, eight) = line
    assert x == at
    assert high == pytest.approx(eight)
    assert low == pytest.approx((zero + four) / 2, abs=0.1)


def test_what_was_taken_back_is_a_line_of_its_own_on_the_same_axes():
    main, attempt = [(1, 1.0), (2, 2.0), (3, 3.0)], [(2, 2.0), (3, -5.0)]
    chart = drawn([Series("s", main, taken_back=[attempt])], rescues=[1])
    (standing,), (taken_back,) = lines(chart), lines(chart, "back")
    assert [len(standing), len(taken_back)] == [3, 2]
    assert taken_back[0] == standing[1]
    assert taken_back[1][1] > standing[0][1]
    assert [x for x, *_ in uprights(chart, "mark")] == [standing[0][0]]
    assert {"taken back", "rescue"} <= {text.text for text in chart.iter("text")}


def test_an_attempt_of_one_step_is_seen():
    chart = drawn([Series("s", [(1, 1.0), (2, 2.0)], taken_back=[[(2, 5.0)]])])
    assert [dot.attrib["class"] for dot in chart.iter("circle")].count("dot back") == 1


def test_the_axes_take_in_what_they_are_told_to():
    (line,) = lines(drawn([Series("s", [(5, 0.5)])], within=(0, 1), over=(0, 10)))
    chart = drawn([Series("s", [(0, 0.0), (10, 1.0)])])
    ((low, high),) = lines(chart)
    ((x, y),) = line
    assert x == pytest.approx((low[0] + high[0]) / 2)
    assert y == pytest.approx((low[1] + high[1]) / 2)


def test_what_is_not_finite_is_left_out_and_nothing_makes_no_chart():
    nan, inf = math.nan, math.inf
    (line,) = lines(drawn([Series("s", [(1, 1.0), (2, nan), (3, inf), (4, 2.0)], [(1, nan, 2.0), (4, 1.0, inf)])]))
    assert len(line) == 2
    assert line_chart("T", [Series("s", [(1, nan)])]) == ""
    assert line_chart("T", []) == ""


def test_numbers_that_hardly_change_make_a_chart_whose_axis_can_be_read():
    for value in (0.0, 1e-300, -5.0, 1e12, 0.6931475):
        for step in (0.0, 1e-9, 1e-5, 1e-3):
            chart = drawn([Series("s", [(1, value), (2, value * (1 + step))])])
            labels = left_of_the_axis(chart)
            assert len(set(labels)) == len(labels) >= 2


def test_lines_are_named_and_have_their_own_colours():
    chart = drawn([Series("one", [(1, 1.0)]), Series("two", [(1, 2.0)])])
    assert [group.attrib["class"] for group in chart.iter("g")] == ["s0", "s1", "s0", "s1"]
    assert {"one", "two"} <= {text.text for text in chart.iter("text")}


def test_the_names_below_stand_side_by_side():
    attempt = [[(1, 1.0), (2, 2.0)]]
    series = [Series(name, [(1, 1.0), (2, 2.0)], taken_back=attempt) for name in ("training", "held out")]
    groups = [group for group in drawn(series, rescues=[1]).iter("g") if "transform" in group.attrib]
    starts = [float(re.findall(r"[\d.]+", group.attrib["transform"])[0]) for group in groups]
    names = [next(group.iter("text")).text or "" for group in groups]
    assert names == ["training", "held out", "taken back", "rescue"]
    ends = [start + 12 + 6.6 * len(name) for start, name in zip(starts, names, strict=True)]
    assert all(end + 10 < start for end, start in zip([*ends], [*starts[1:], 420], strict=True))


def test_a_line_keeps_its_colour_and_its_name_where_the_others_have_no_points():
    chart = drawn([Series("one", []), Series("two", [(1, 2.0)])])
    assert {group.attrib["class"] for group in chart.iter("g")} == {"s1"}
    assert "two" in {text.text for text in chart.iter("text")}
