"""report.html: a run to look at, in one file that asks nothing of the network."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.align.charts import STYLE, Series, line_chart
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.storage import write_whole

REPORT = "report.html"
_STYLE = """
:root{color-scheme:light dark;--ink:#22303a;--soft:#5d6b75;--paper:#fbfaf7;--card:#fff;--line:#dcd8cf}
@media(prefers-color-scheme:dark){:root{--ink:#e7e3da;--soft:#a9b2b8;--paper:#1b1f22;--card:#24292d;--line:#3a4146}}
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
"""


class Sample(NamedTuple):
    """The same question answered before and after; `unseen` where it was not trained on."""

    question: str
    before: str
    after: str
    unseen: bool


def write(out: Path, page: str) -> Path:
    """Write the page into the run's folder."""
    write_whole(out / REPORT, page.encode())
    return out / REPORT


def page(
    options: TrainOptions, rows: Sequence[dict[str, Any]], samples: Sequence[Sample], facts: dict[str, Any]
) -> str:
    """The whole page, from the rows of metrics.jsonl, the samples and the manifest's facts."""
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    body = [
        f"<h1>{html.escape(options.out.name)}</h1>",
        f'<p class="lead">{html.escape(_lead(options, steps))}</p>',
        _held_out(evaluations[-1] if evaluations else None),
        "<h2>Step by step</h2>",
        f'<div class="charts">{"".join(_charts(steps, evaluations))}</div>',
        _samples(samples, options.sample_tokens),
        _table("Options", as_toml(options)),
        _table("Base model", _base(facts["base"])),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(options.out.name)}: training report</title><style>{_STYLE}{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _lead(options: TrainOptions, steps: Sequence[dict[str, Any]]) -> str:
    seconds = sum(row["seconds"] for row in steps)
    tokens = steps[-1]["num_tokens"] if steps else 0
    return (
        f"{options.method} of {options.model.name} on {options.data.name}: {len(steps)} steps, {tokens:,} tokens, "
        f"{seconds / 60:.1f} minutes of training."
    )


def _held_out(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<p>No pairs were held out, so nothing here says how well this carries over to new questions.</p>"
    if "eval_rewards/accuracies" not in row:
        loss = f"On {row['eval_pairs']} held-out answers the loss is {row['eval_loss']:.4f} nats a token."
        return f"<p>{loss} {_moved(row)}</p>"
    return (
        f"<p>On {row['eval_pairs']} held-out pairs the aligned model prefers the chosen answer more than the "
        f"reference does in <b>{row['eval_rewards/accuracies']:.0%}</b> "
        f"(95% interval {row['eval_rewards/accuracies_low']:.0%} to {row['eval_rewards/accuracies_high']:.0%}). "
        f"{_moved(row)}</p>"
    )


def _moved(row: dict[str, Any]) -> str:
    moved = row["eval_logps/chosen"] - row["eval_logps/chosen_reference"]
    direction = "rose" if moved >= 0 else "fell"
    return f"The log-probability of the chosen answers {direction} by {abs(moved):.1f} nats on average."


def _charts(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[str]:
    def series(name: str, key: str, rows: Sequence[dict[str, Any]] = steps) -> Series:
        return Series(name, [(row["step"], row[key]) for row in rows if key in row])

    pictures = [
        ("Loss", [series("training", "loss"), series("held out", "eval_loss", evaluations)], "", ()),
        (
            "Reward accuracy",
            [series("training", "rewards/accuracies"), series("held out", "eval_rewards/accuracies", evaluations)],
            "share of pairs",
            (0, 1),
        ),
        ("Rewards", [series("chosen", "rewards/chosen"), series("rejected", "rewards/rejected")], "β × log-ratio", ()),
        ("Margin", [series("training", "rewards/margins")], "chosen − rejected", ()),
        (
            "Log-probability of answers",
            [series("chosen", "logps/chosen"), series("rejected", "logps/rejected")],
            "nats",
            (),
        ),
        ("Gradient norm", [series("before clipping", "grad_norm")], "before clipping", (0,)),
        ("Learning rate", [series("rate", "learning_rate")], "", (0,)),
        ("Speed", [series("tokens", "tokens_per_second")], "tokens a second", (0,)),
        ("Peak memory", [series("memory", "peak_memory_gb")], "GB", (0,)),
    ]
    drawn = (line_chart(title, [s for s in lines if s.points], *rest) for title, lines, *rest in pictures)
    return [picture for picture in drawn if picture]


def _samples(samples: Sequence[Sample], longest: int) -> str:
    if not samples:
        return ""
    seen = "" if all(sample.unseen for sample in samples) else " Some of these questions were trained on."
    blocks = [
        "<h2>The same questions, before and after</h2>",
        f'<p class="lead">The likeliest words each time, cut off after {longest} tokens.{seen} No clinician has '
        "reviewed these answers: they are a language model's words and may be wrong.</p>",
    ]
    for sample in samples:
        blocks.append(f"<h3>{html.escape(sample.question)}</h3>")
        columns = (("Before", sample.before), ("After", sample.after))
        texts = "".join(f"<div><b>{name}</b>{html.escape(text)}</div>" for name, text in columns)
        blocks.append(f'<div class="pair">{texts}</div>')
    return "".join(blocks)


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
