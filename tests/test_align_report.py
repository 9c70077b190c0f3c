"""The report: one file that asks nothing of the network, trusts nothing it quotes and leaves nothing out."""

import html
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import runs

from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.report import Sample, page
from mlx_dpo.data.reading import read, split_off

Folder = Callable[[str], Path]
HOSTILE = '<script>alert("x")</script> & <img src=https://example.org/x onerror=alert(1)>'
BASE = {"model": "m", "sha256": {"model.safetensors": "ab" * 32}, "source": None, "licence": "mit"}
VOID = {"meta", "circle", "line", "polyline"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "i", "small", "ul", "li",
    "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg", "text", "line", "polyline", "circle", "g",
}  # fmt: skip
CHARTS = [
    "Loss", "Reward accuracy", "Rewards", "Margin", "Share of the margin in the first five tokens",
    "Log-probability of answers", "Chosen answers against the start", "KL from the base along sampled answers",
    "Length of sampled answers", "Gradient norm", "Learning rate", "Speed", "Peak memory",
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


def said(text: str) -> str:
    """What the page says, as one line."""
    return " ".join(" ".join(reader(text).texts).split())


def step(number: int, **more: Any) -> dict[str, Any]:
    names = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "logps/chosen_shift", "margins/opening_share", "grad_norm", "learning_rate",
        "tokens_per_second", "seconds", "peak_memory_gb",
    )  # fmt: skip
    values = {name: number * 0.1 + at for at, name in enumerate(names)}
    return {"step": number, "num_tokens": 100 * number} | values | more


def evaluation(number: int, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"step": number, "eval_loss": 0.5, "eval_pairs": 20}
    for name, value in (("rewards/accuracies", 0.85), ("rewards/margins", 0.75), ("logps/chosen_shift", -12.0)):
        found |= {f"eval_{name}": value, f"eval_{name}_low": value - 0.25, f"eval_{name}_high": value + 0.125}
    found |= {"eval_rewards/chosen": 0.5, "eval_logps/chosen": -212.0, "eval_logps/chosen_reference": -200.0}
    return found | {"eval_loss_low": 0.25, "eval_loss_high": 0.75} | more


def warned(kind: str, text: str) -> dict[str, Any]:
    return {"warnings": [{"kind": kind, "text": text}]}


def rescue(called_at: int, back_to: int, abandoned: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    said = {"rescue": 1, "called_at": called_at, "back_to": back_to, "sft_weight": 1.0, "rate_factor": 1.0}
    return {"step": back_to, **said, "reason": "It fell.", "abandoned": list(abandoned)} | more


def rescued(steps: int) -> list[dict[str, Any]]:
    """A run that went wrong in its second half and took that once more."""
    half = steps // 2
    rows = [row for n in range(1, half + 1) for row in (step(n), evaluation(n))]
    abandoned = [row for n in range(half + 1, steps + 1) for row in (step(n, loss=9.0), evaluation(n, eval_loss=8.0))]
    again = [row for n in range(half + 1, steps + 1) for row in (step(n), evaluation(n))]
    return [*rows, rescue(steps, half, abandoned), *again]


def answered(*steps: int, text: str = "An answer.") -> list[dict[str, Any]]:
    return [{"step": n, "tokens": 80.0 - n, "kl": 0.01 * n, "answers": [f"{text} ({n})"]} for n in steps]


def made(
    tmp_path: Path,
    rows: Sequence[dict[str, Any]],
    samples: Sequence[Sample] = (),
    sampled: Sequence[dict[str, Any]] = (),
    facts: dict[str, Any] | None = None,
    planned: int | None = None,
    **options: Any,
) -> str:
    given: dict[str, Any] = {"model": tmp_path / "m", "data": tmp_path / "d", "out": tmp_path / "out"} | options
    return page(TrainOptions(**given), rows, samples, {"base": BASE} | (facts or {}), sampled, planned)


def pictures(text: str) -> dict[str, ElementTree.Element]:
    every = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    return {svg.attrib["aria-label"].partition(":")[0]: svg for svg in every}


def table(text: str) -> dict[str, list[str]]:
    """The held-out table: the cells of each measure."""
    body = text.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = {}
    for row in body.split("</tr>")[:-1]:
        name, *values = re.findall("<(?:th|td)[^>]*>(.*?)(?:<small>.*?)?</(?:th|td)>", row)
        cells[name] = [re.sub("<.*?>", "", value) for value in values]
    return cells


def test_what_it_quotes_stays_text(tmp_path: Path):
    rows = [
        step(1, **warned(HOSTILE, HOSTILE)),
        rescue(2, 1, [step(2, **warned("displacement", HOSTILE))], reason=f"{HOSTILE}!"),
        step(2),
        evaluation(2),
    ]
    samples = [Sample(HOSTILE, HOSTILE, HOSTILE, True)]
    sampled = answered(0, 1, 2, text=HOSTILE)
    facts = {"start": {"adapter": HOSTILE, "sha256": "cd"}}
    text = made(tmp_path, rows, samples, sampled, facts, out=tmp_path / "<b>run")
    found = reader(text)
    assert {tag for tag, _ in found.tags} <= TAGS
    assert all(not name.startswith("on") for _, attributes in found.tags for name in attributes)
    # Twice a warning and once its kind, the reason, the question, before, after and in between, the start adapter.
    assert sum(words.count(HOSTILE.replace("_", " ")) for words in found.texts) == 9
    assert "<b>run" in found.texts


def test_it_asks_nothing_of_the_network(tiny_folder: Folder, tmp_path: Path):
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    given = {"samples": 2, "holdout": 0.3, "epochs": 3, "eval_every": 1}
    runs.run(runs.options(tiny_folder("llama"), data, tmp_path / "out", **given))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = reader(text)
    assert not any({"src", "href", "srcset", "action", "data"} & attributes.keys() for _, attributes in found.tags)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", text)
    asked = re.findall("<h3>(.*?)</h3>", text)
    _, held_out = split_off(read(data, kind="pairs").train, 0.3, seed=0)
    assert asked == [html.escape(example.prompt[-1]["content"]) for example in held_out]
    assert text.count("<details>") == len(asked)
    assert list(pictures(text)) == CHARTS


def test_every_number_has_its_chart(tmp_path: Path):
    text = made(tmp_path, rescued(6), sampled=answered(0, 3, 6))
    assert list(pictures(text)) == CHARTS


@pytest.mark.parametrize("make", [lambda n: [step(k) for k in range(1, n + 1)], rescued], ids=["plain", "rescued"])
@pytest.mark.parametrize("steps", [1, 2, 3, 500])
def test_charts_of_any_length_are_whole_and_within_their_frame(
    tmp_path: Path, steps: int, make: Callable[[int], list[dict[str, Any]]]
):
    charts = pictures(made(tmp_path, make(steps), sampled=answered(0, steps)))
    assert charts.keys() == set(CHARTS)
    for name, root in charts.items():
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        axes = [group for group in root.iter("g") if "transform" not in group.attrib]
        lines = [line for group in axes for line in group.iter("polyline")]
        counts = [len(line.attrib["points"].split()) for line in lines if "class" not in line.attrib]
        assert set(counts) == {2 if "sampled" in name else steps}
        places = [tuple(map(float, point.split(","))) for line in lines for point in line.attrib["points"].split()]
        for line in root.findall("line") + [line for group in axes for line in group.iter("line")]:
            places += [(float(line.attrib[f"x{end}"]), float(line.attrib[f"y{end}"])) for end in (1, 2)]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
        assert all(0 <= float(text.attrib["y"]) <= height for text in root.iter("text"))


def test_what_a_rescue_took_back_is_drawn_apart(tmp_path: Path):
    loss = pictures(made(tmp_path, rescued(10)))["Loss"]
    lines = [
        line.attrib for group in loss.iter("g") if "transform" not in group.attrib for line in group.iter("polyline")
    ]
    counts = [(line.get("class"), len(line["points"].split())) for line in lines]
    assert counts == [("back", 5), (None, 10), ("back", 5), (None, 10)]  # of training, and held out
    assert len([line for line in loss.findall("line") if line.get("class") == "mark"]) == 1
    assert len([line for line in loss.iter("line") if line.get("class") == "whisker"]) == 10


def test_a_run_without_held_out_pairs_or_samples_says_so_and_shows_what_there_is(tmp_path: Path):
    bare = {name: value for name, value in step(1).items() if "/" not in name}
    text = made(tmp_path, [bare], facts={"step": 1, "start": None})
    assert "No pairs were held out" in text
    assert "Nothing was found wrong. It looked at 1 step, 0 evaluations and 0 rounds" in text
    assert list(pictures(text)) == ["Loss", *CHARTS[-4:]]
    assert not {"<h3>", "<details>", "<thead>", "Start adapter"} & set(re.findall("<[a-z0-9]+>|Start adapter", text))


def test_a_warning_appears_word_for_word_with_its_step(tmp_path: Path):
    words = "The gradient norm is 31.2, 9 times that of the 10 steps before: add --warmup & look."
    text = said(made(tmp_path, [step(1), step(2, **warned("gradient_spike", words))]))
    assert f"Step 2, gradient spike. {words}" in text
    assert "Nothing was found wrong" not in text


def test_a_rescue_is_told_in_order_with_what_was_taken_back(tmp_path: Path):
    first = rescue(4, 2, [step(3), step(4, **warned("displacement", "It fell."))])
    # The second rescue goes back further, and takes the first one back with its attempt.
    inner = [step(2), first, step(3, **warned("displacement", "It fell again."))]
    second = rescue(3, 1, inner, reason="Step 4 gave a loss of nan.", rate_factor=0.5, rescue=2)
    text = said(made(tmp_path, [step(1), second, step(2, **warned("shortcut", "By how they begin."))]))
    expected = [
        "Step 4, displacement (in an attempt that was taken back). It fell.",
        "Rescue (in an attempt that was taken back). Called for at step 4, the run went back to step 2 and on from "
        "there with the chosen answers' likelihood at weight 1 in the loss. The reason: what was found at step 4, "
        "above.",
        "Step 3, displacement (in an attempt that was taken back). It fell again.",
        "Rescue. Called for at step 3, the run went back to step 1 and on from there with the learning rate times 0.5. "
        "The reason: Step 4 gave a loss of nan.",
        "Step 2, shortcut. By how they begin.",
    ]
    assert " ".join(expected) in text
    assert "Rescues took back 4 more steps" in text


def test_the_first_lines_say_what_was_kept_and_why_it_ended(tmp_path: Path):
    rows = [step(n, seconds=30.0) for n in range(1, 5)] + [evaluation(2), evaluation(4)]
    text = said(made(tmp_path, rows, facts={"step": 2}, planned=8, best_by="margin"))
    assert "4 steps, 400 tokens, 2.0 minutes" in text
    assert "after 4 of 8 steps" in text
    assert "The adapter kept is that of step 2, at which the held-out margin was the widest." in text
    whole = said(made(tmp_path, rows, facts={"step": 4}, planned=4))
    assert "The adapter kept" not in whole
    assert "ended early" not in whole


def test_the_held_out_table_has_before_first_and_kept_with_intervals(tmp_path: Path):
    share = {"eval_logps/preferred_per_token": 0.65, "eval_logps/preferred_per_token_reference": 0.6}
    first = evaluation(2, **{"eval_rewards/margins": 0.25, "eval_loss": 0.625})
    text = made(tmp_path, [step(2), first, evaluation(4, **share), evaluation(6)], facts={"step": 4})
    assert re.findall("<thead>.*</thead>", text)[0].count("step 4") == 1
    assert table(text) == {
        "Prefers the chosen answer (reward accuracy)": ["–", "85% (60% to 98%)", "85% (60% to 98%)"],
        "Prefers the chosen answer, per token": ["60%", "–", "65%"],
        "Margin": ["0", "+0.25 (+0.50 to +0.88)", "+0.75 (+0.50 to +0.88)"],
        "Log-probability of the chosen answers": ["−200.0", "−212.0", "−212.0"],
        "Its change since before training": ["0", "−12.0 (−12.2 to −11.9)", "−12.0 (−12.2 to −11.9)"],
        "Loss": ["–", "0.625 (0.250 to 0.750)", "0.500 (0.250 to 0.750)"],
    }
    assert "fell by 12.0 nats" in text


def test_only_what_a_method_measures_stands_in_the_table(tmp_path: Path):
    logps = {"eval_logps/chosen": -180.0, "eval_logps/chosen_reference": -200.0, "eval_logps/chosen_shift": 20.0}
    sft = made(tmp_path, [step(1), {"step": 1, "eval_loss": 1.5, "eval_pairs": 9} | logps], method="sft")
    assert "9 held-out answers" in sft
    assert table(sft) == {
        "Log-probability of the chosen answers": ["−200.0", "−180.0"],
        "Its change since before training": ["0", "+20.0"],
        "Loss": ["–", "1.500"],
    }
    # SimPO's own log-probabilities are means per token, and it has no reference.
    means = evaluation(1, **{"eval_logps/chosen": -1.42})
    simpo = table(made(tmp_path, [step(1), means], loss="simpo"))
    assert simpo["Log-probability of the chosen answers"] == ["–", "−1.42"]
    assert simpo["Margin"][0] == "–"


def test_answers_in_between_can_be_unfolded(tmp_path: Path):
    sampled = answered(0, 2, 4, 6)
    samples = [Sample("Why?", "An answer. (0)", "An answer. (4)", True)]
    text = made(tmp_path, [step(n) for n in range(1, 7)], samples, sampled, {"step": 4})
    shown, folded = text.partition("<details>")[::2]
    assert re.findall(r"<b>(.*?)</b>An answer\. \((\d)\)", shown) == [("Before", "0"), ("After step 4", "4")]
    folded = folded.partition("</details>")[0]
    assert re.findall(r"<b>(.*?)</b>An answer\. \((\d)\)", folded) == [("Step 2", "2"), ("Step 6", "6")]
    assert "No clinician has reviewed these answers" in text
