"""report.html: a run to look at, in one file that asks nothing of the network."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.align import charts, curves, history, outcome
from mlx_dpo.align.examples import Prepared
from mlx_dpo.align.history import Row
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.rescue import Rescue
from mlx_dpo.storage import write_whole

REPORT = "report.html"
STYLE = """
:root{color-scheme:light dark}
:root{--ink:#22303a;--soft:#5d6b75;--paper:#fbfaf7;--card:#fff;--line:#dcd8cf;--warn:#c07a14;--mend:#3d7f5f}
@media(prefers-color-scheme:dark){:root{--ink:#e7e3da;--soft:#a9b2b8;--paper:#1b1f22;--card:#24292d;--line:#3a4146;--warn:#e0a040;--mend:#74c09b}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1000px;margin:0 auto;
padding:24px;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1.6rem 0 .5rem}
p.lead{color:var(--soft);margin:.2rem 0 1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));gap:14px}
.charts svg{background:var(--card);border:1px solid var(--line);border-radius:8px;width:100%;height:auto}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:6px 16px 6px 0;
border-bottom:1px solid var(--line)}th{font-weight:600;white-space:nowrap;width:1%}td{font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:14px}.pair div{background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:10px 14px;white-space:pre-wrap}.pair b{display:block;color:var(--soft);font-weight:600}
@media(max-width:640px){.pair{grid-template-columns:1fr}}
ul.found{list-style:none;padding:0}ul.found li{border-left:4px solid var(--warn);padding:2px 0 2px 12px;margin:10px 0}
ul.found li.rescue{border-color:var(--mend)}ul.found li.back{border-left-style:dashed}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}details .pair{margin-top:10px}
"""
_CAPTION = "Dots with an upright bar are evaluations on held-out examples; the bar is the 95% interval."
_RESCUED = (
    " A dotted upright line marks the step that a rescue went back to, a paler dashed line the steps that it took "
    "back. A rescue may change the training loss, which then is not to be compared across it; the held-out loss stays "
    "the same one."
)
_BEST = {
    "loss": "loss was the lowest",
    "accuracy": "reward accuracy was the highest",
    "margin": "margin was the widest",
    "chosen": "chosen answers were the likeliest",
}


class Sample(NamedTuple):
    """The same question answered before and after; `unseen` where it was not trained on."""

    question: str
    before: str
    after: str
    unseen: bool


def samples(rows: Sequence[Row], step: int, prepared: Prepared) -> list[Sample]:
    """What was answered before the first step and at `step`, from the rows of samples.jsonl."""
    answers = [row["answers"] for row in rows if row["step"] in (0, step)]
    if not answers:
        return []
    return [
        Sample(question[-1]["content"], before, after, prepared.unseen)
        for question, before, after in zip(prepared.questions, answers[0], answers[-1], strict=True)
    ]


def write(out: Path, page: str) -> Path:
    """Write the page into the run's folder."""
    write_whole(out / REPORT, page.encode())
    return out / REPORT


def page(
    options: TrainOptions,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    facts: dict[str, Any],
    answered: Sequence[Row] = (),
    planned: int | None = None,
) -> str:
    """The whole page, from the rows of metrics.jsonl, the samples and the manifest's facts.

    `answered` are the rows of samples.jsonl, whose answers are to the samples' questions in their order; `planned` is
    the number of steps that the run was to take.
    """
    taken = len(history.steps(rows))
    kept = facts.get("step", taken)
    name = html.escape(options.out.name)
    pictures = curves.charts(options, rows, answered)
    caption = _CAPTION * bool(history.evaluations(rows)) + _RESCUED * bool(history.rescues(rows))
    body = [
        f"<h1>{name}</h1>",
        f'<p class="lead">{html.escape(" ".join(_lead(options, rows, kept, planned)))}</p>',
        f"<h2>What the monitor found</h2>{_found(rows, answered)}",
        f"<h2>Before and after, on held-out examples</h2>{outcome.table(options, rows, kept)}",
        f'<h2>Step by step</h2><p class="lead">{caption}</p>' if caption else "<h2>Step by step</h2>",
        f'<div class="charts">{"".join(pictures)}</div>',
        _samples(samples, answered, kept, options.sample_tokens),
        _table("Options", as_toml(options)),
        _table("Start adapter", facts["start"]) if facts.get("start") else "",
        _table("Base model", _base(facts["base"])),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{name}: training report</title><style>{STYLE}{charts.STYLE}{outcome.STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _lead(options: TrainOptions, rows: Sequence[Row], kept: int, planned: int | None) -> Iterator[str]:
    steps = history.steps(rows)
    way = "answers or text alone (SFT)" if options.method == "sft" else f"preferences (DPO, loss {options.loss})"
    tokens = steps[-1]["num_tokens"] if steps else 0
    yield (
        f"{options.model.name}, learning from {way} in {options.data.name}: {_count(len(steps), 'step')}, {tokens:,} "
        f"tokens, {_minutes(steps)} minutes of training."
    )
    again = [row for attempt in history.attempts(rows) for row in history.steps(attempt)]
    if again:
        yield f"Rescues took back {_count(len(again), 'more step')} ({_minutes(again)} minutes)."
    if planned is not None and len(steps) < planned:
        yield f"It ended early, after {len(steps)} of {planned} steps, since the evaluations got no better."
    if kept != len(steps):
        yield f"The adapter kept is that of step {kept}, at which the held-out {_BEST[options.best_by]}."


def _minutes(steps: Sequence[Row]) -> str:
    return f"{sum(row['seconds'] for row in steps) / 60:.1f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _found(rows: Sequence[Row], answered: Sequence[Row]) -> str:
    """What was found wrong in the order in which it was, and what rescues did about it."""
    looked_at = (
        f"It looked at {_count(len(history.steps(rows)), 'step')}, "
        f"{_count(len(history.evaluations(rows)), 'evaluation')} and "
        f"{_count(len(answered), 'round')} of sample answers."
    )
    entries = [entry for row, taken_back in history.in_order(rows) for entry in _entries(row, taken_back)]
    if not entries:
        return f"<p>Nothing was found wrong. {looked_at}</p>"
    return f'<p class="lead">{looked_at}</p><ul class="found">{"".join(entries)}</ul>'


def _entries(row: Row, taken_back: bool) -> Iterator[str]:
    attempt = " (in an attempt that was taken back)" if taken_back else ""
    for finding in row.get("warnings", ()):
        kind = finding["kind"].replace("_", " ")
        yield _entry("back" if taken_back else "", f"Step {row['step']}, {kind}{attempt}.", finding["text"])
    if "abandoned" in row:
        rescue = Rescue(**{name: row[name] for name in Rescue._fields})
        told = [
            back["step"] for back in row["abandoned"] for f in back.get("warnings", ()) if f["text"] == rescue.reason
        ]
        why = f"what was found at step {told[-1]}, above." if told else rescue.reason
        yield _entry(
            "rescue",
            f"Rescue{attempt}.",
            f"Called for at step {rescue.called_at}, the run went back to step {rescue.back_to} and on from there "
            f"{rescue.in_words()}. The reason: {why}",
        )


def _entry(kind: str, name: str, text: str) -> str:
    return f'<li class="{kind}"><b>{html.escape(name)}</b> {html.escape(text)}</li>'


def _samples(samples: Sequence[Sample], answered: Sequence[Row], kept: int, longest: int) -> str:
    if not samples:
        return ""
    seen = "" if all(sample.unseen for sample in samples) else " Some of these questions were trained on."
    blocks = [
        "<h2>The same questions, before and after</h2>",
        f'<p class="lead">The likeliest words each time, cut off after {longest} tokens.{seen} No clinician has '
        "reviewed these answers: they are a language model's words and may be wrong.</p>",
    ]
    others = [row for row in answered if row["step"] not in (0, kept)]
    for number, sample in enumerate(samples):
        blocks.append(f"<h3>{html.escape(sample.question)}</h3>")
        blocks.append(_answers([("Before", sample.before), (f"After step {kept}", sample.after)]))
        if others:
            answers = [(f"Step {row['step']}", row["answers"][number]) for row in others]
            blocks.append(f"<details><summary>{_at_steps(others)}</summary>{_answers(answers)}</details>")
    return "".join(blocks)


def _at_steps(rows: Sequence[Row]) -> str:
    steps = [str(row["step"]) for row in rows]
    return f"The answers at step{'' if len(steps) == 1 else 's'} {', '.join(steps)}"


def _answers(named: Sequence[tuple[str, str]]) -> str:
    texts = "".join(f"<div><b>{name}</b>{html.escape(text)}</div>" for name, text in named)
    return f'<div class="pair">{texts}</div>'


def _base(facts: dict[str, Any]) -> dict[str, Any]:
    source = facts["source"]
    return facts | {
        "sha256": ", ".join(facts["sha256"].values()),
        "source": source.get("name") if isinstance(source, dict) else source,
    }


def _table(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
        if value not in (None, [], "")
    )
    return f"<h2>{title}</h2><table>{rows}</table>"
