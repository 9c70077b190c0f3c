"""The report: one file that asks nothing of the network, trusts nothing it quotes and leaves nothing out."""

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import runs

from mlx_dpo.align.charts import Series, line_chart
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.report import Sample, page
from mlx_dpo.data.reading import read, split_off

Folder = Callable[[str], Path]
HOSTILE = '<script>alert("x")</script> & <img src=https://example.org/x onerror=alert(1)>'
FACTS = {"base": {"model": "m", "sha256": {"model.safetensors": "ab" * 32}, "source": None, "licence": "mit"}}
VOID = {"meta", "circle", "line", "polyline"}
CHARTS = [
    "Loss", "Reward accuracy", "Rewards", "Margin", "Log-probability of answers", "Gradient norm", "Learning rate",
    "Speed", "Peak memory",
]  # fmt: skip


class Reader(HTMLParser):
    """Every tag with its attributes, every text, and whether what was opened was closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def reader(text: str) -> Reader:
    found = Reader()
    found.feed(text)
    assert found.open == []
    return found


def row(step: int) -> dict[str, float]:
    names = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "peak_memory_gb",
    )  # fmt: skip
    return {"step": step, "num_tokens": 100 * step} | {name: step * 0.1 + at for at, name in enumerate(names)}


def made(tmp_path: Path, steps: int = 6, sample: str = HOSTILE, **options: str) -> str:
    given = TrainOptions(model=tmp_path / "m", data=tmp_path / "d", out=tmp_path / options.get("out", "out"))
    return page(given, [row(step) for step in range(1, steps + 1)], [Sample(sample, sample, sample, True)], FACTS)


def test_what_it_quotes_stays_text(tmp_path: Path):
    found = reader(made(tmp_path, out="<b>run"))
    assert found.texts.count(HOSTILE) == 3
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "table", "tr", "th", "td",
        "svg", "text", "line", "polyline", "circle", "g",
    }  # fmt: skip
    assert "<b>run" in found.texts


def test_it_asks_nothing_of_the_network(tiny_folder: Folder, tmp_path: Path):
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    runs.run(runs.options(tiny_folder("llama"), data, tmp_path / "out", samples=2, holdout=0.3, epochs=3))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = reader(text)
    assert not any({"src", "href", "srcset", "action", "data"} & attributes.keys() for _, attributes in found.tags)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", text)
    asked = re.findall("<h3>(.*?)</h3>", text)
    _, held_out = split_off(read(data, kind="pairs").train, 0.3, seed=0)
    assert asked == [html.escape(example.prompt[-1]["content"]) for example in held_out]


def test_every_number_has_its_chart(tmp_path: Path):
    found = reader(made(tmp_path))
    labels = [attributes["aria-label"] for tag, attributes in found.tags if tag == "svg"]
    assert [label.partition(":")[0] for label in labels if label] == CHARTS


@pytest.mark.parametrize("steps", [1, 2, 3, 500])
def test_charts_of_any_length_are_whole_and_within_their_frame(tmp_path: Path, steps: int):
    for svg in re.findall(r"<svg.*?</svg>", made(tmp_path, steps)):
        root = ElementTree.fromstring(svg)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        lines = [line.attrib["points"].split() for line in root.iter("polyline")]
        assert all(len(points) == steps for points in lines)
        places = [tuple(map(float, point.split(","))) for points in lines for point in points]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
        assert all(0 <= float(text.attrib["y"]) <= height for text in root.iter("text"))


def test_steps_on_the_axis_are_whole():
    for last in (1, 2, 3, 7, 32, 1000):
        chart = line_chart("T", [Series("s", [(step, step * 0.37) for step in range(1, last + 1)])])
        below = [
            text for text in ElementTree.fromstring(chart).iter("text") if text.attrib.get("text-anchor") == "middle"
        ]
        assert 1 <= len(below) <= 7
        assert all(float(text.text or "nan").is_integer() for text in below)


def test_a_line_goes_up_where_its_numbers_do():
    chart = ElementTree.fromstring(line_chart("T", [Series("s", [(1, -3.0), (2, 5.0), (3, 1.0)])]))
    line = next(chart.iter("polyline"))
    (x1, y1), (x2, y2), (x3, y3) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert x2 - x1 == pytest.approx(x3 - x2)
    # Three eighths of the way from -3 to 5 is 0, half of it is 1.
    assert (y3 - y1) / (y2 - y1) == pytest.approx(0.5, abs=0.01)
    assert y2 < y1


def test_what_is_not_finite_is_left_out_and_nothing_makes_no_chart():
    chart = line_chart("T", [Series("s", [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)])])
    assert len(next(ElementTree.fromstring(chart).iter("polyline")).attrib["points"].split()) == 2
    assert line_chart("T", [Series("s", [(1, float("nan"))])]) == ""
    assert line_chart("T", []) == ""


def test_numbers_that_never_change_make_a_chart():
    for value in (0.0, 1e-300, -5.0, 1e12):
        assert "polyline" in line_chart("T", [Series("s", [(1, value), (2, value)])])


def test_two_lines_are_named_and_have_their_own_colours():
    chart = ElementTree.fromstring(line_chart("T", [Series("one", [(1, 1.0)]), Series("two", [(1, 2.0)])]))
    groups = [group.attrib["class"] for group in chart.iter("g")]
    assert groups == ["s0", "s1", "s0", "s1"]
    assert {"one", "two"} <= {text.text for text in chart.iter("text")}
