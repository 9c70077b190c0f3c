"""report.html of an evaluation: one file that asks nothing of the network."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_dpo.align.report import STYLE
from mlx_dpo.data.asked import Asked
from mlx_dpo.evaluation import forest
from mlx_dpo.evaluation.measures import MEASURES
from mlx_dpo.evaluation.words import CAUTION, verdict

_SHOWN = 12  # questions with all their answers
_STYLE = """
.wide{overflow-x:auto}.wide td,.wide th{width:auto;min-width:84px;white-space:normal;padding-right:12px;font-size:14px}
.wide small{color:var(--soft);white-space:nowrap;display:block}td.floor,th.floor{color:var(--soft);font-style:italic}
.many{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr));gap:12px}
.many div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;white-space:pre-wrap}
.many b{display:block;color:var(--soft)}
"""


def page(
    found: dict[str, Any], asked: Sequence[Asked], answers: Mapping[str, Sequence[str]], options: dict[str, Any]
) -> str:
    """The whole page, from the comparison, the questions and every system's answers."""
    name = html.escape(str(options["out"]).rstrip("/").rpartition("/")[2])
    body = [
        f"<h1>{name}</h1>",
        f'<p class="lead">{found["questions"]} questions of {html.escape(str(options["data"]))}, the same prompt for '
        f"all, greedy answers of at most {options['max_tokens']} tokens.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in found["notes"]),
        "<h2>All questions</h2>",
        *_tables(found["all"]),
    ]
    if "far" in found:
        body += [
            f"<h2>Without the {found['near_questions']} questions near what was learnt</h2>",
            *_tables(found["far"]),
        ]
    if said := verdict(found):
        body += ["<h2>The judge</h2>", *(f"<p>{html.escape(line)}</p>" for line in said)]
    body += [f'<p class="lead">{CAUTION}</p>', "<h2>Answers side by side</h2>", *_samples(asked, answers)]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{name}: evaluation</title><style>{STYLE}{_STYLE}{forest.STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _tables(tables: dict[str, Any]) -> Iterator[str]:
    """Means with intervals, and a forest plot of the differences for each measure that decides."""
    rows = {**tables["systems"], **tables["floors"]}
    shown = [measure for measure in MEASURES if any(measure.name in of for of in rows.values())]
    kinds = [' class="floor"' if name in tables["floors"] else "" for name in rows]
    heads = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(rows, kinds, strict=True))
    yield f'<div class="wide"><table><tr><th></th>{heads}</tr>'
    for measure in shown:
        cells = "".join(
            f"<td{k}>{_cell(of.get(measure.name))}</td>" for of, k in zip(rows.values(), kinds, strict=True)
        )
        yield f"<tr><th>{html.escape(measure.words)}{measure.arrow}</th>{cells}</tr>"
    yield "</table></div>"
    for measure in shown:
        if measure.primary or measure.margin is not None:
            lines = [
                forest.Line(f"{e['system']} − {e['against']}", e["mean"], e["low"], e["high"], e["better"])
                for e in tables["differences"]
                if e["measure"] == measure.name
            ]
            direction = "more is better" if measure.higher_is_better else "less is better"
            if lines:
                yield forest.forest(lines, f"{measure.words} ({direction})")


def _cell(of: dict[str, float] | None) -> str:
    return f"{of['mean']:.3g} <small>{of['low']:.3g} – {of['high']:.3g}</small>" if of else "–"


def _samples(asked: Sequence[Asked], answers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield (
        '<p class="lead">The first questions, with the answers of all. No clinician has reviewed these answers: most '
        "are a language model's words and may be wrong.</p>"
    )
    for number, question in enumerate(asked[:_SHOWN]):
        texts = {name: every[number] for name, every in answers.items()}
        if question.reference is not None:
            texts["reference"] = question.reference
        blocks = "".join(f"<div><b>{html.escape(name)}</b>{html.escape(text)}</div>" for name, text in texts.items())
        yield f'<h3>{html.escape(question.question)}</h3><div class="many">{blocks}</div>'
