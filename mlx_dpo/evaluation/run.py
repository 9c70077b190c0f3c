"""One evaluation, from questions to a report."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.align.events import Note, Phase
from mlx_dpo.align.record import base_facts, versions
from mlx_dpo.data.asked import read_asked
from mlx_dpo.data.audit.copies import Encode
from mlx_dpo.data.reading import read
from mlx_dpo.evaluation import judge, report, words
from mlx_dpo.evaluation.answering import answered
from mlx_dpo.evaluation.comparison import compared
from mlx_dpo.evaluation.options import EvaluateOptions
from mlx_dpo.evaluation.verdicts import judged
from mlx_dpo.models.load import load_to_compute
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import held, sha256_of, write_whole, writing

REPORT, PAGE, CARD = "report.json", "report.html", "card.md"


class Evaluated(NamedTuple):
    """The comparison, and where it was written."""

    out: Path
    found: dict[str, Any]


Event = Note | Phase | Evaluated


def run(options: EvaluateOptions, encode: Encode | None) -> Iterator[Event]:
    """Let all systems answer, weigh their answers and write the report; the last event is Evaluated.

    Raises Refusal. A run that was stopped goes on where it was, and gives the same report.
    """
    asked = read_asked(options.data)[: options.limit]
    if not asked:
        raise Refusal(f"{options.data} holds no questions: give a file with some.")
    learnt = [] if options.train is None else read(options.train, kind="pairs").train
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        with held(options.out):
            answers = yield from answered(asked, options)
            yield Phase("Weighing the answers", 0, 1)
            found = compared(asked, answers, learnt, encode, options.seed)
            if options.judge is not None:
                yield Note(f"Judging with {options.judge}")
                ask = judge.asking(load_to_compute(options.judge))
                found["judge"] = judged(ask, asked, answers, options.seed)
            found |= {"made": _made(options), "systems": list(answers)}
            write_whole(options.out / REPORT, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
            write_whole(options.out / CARD, words.card(found, _plain(options)).encode())
            write_whole(options.out / PAGE, report.page(found, asked, answers, _plain(options)).encode())
    yield Evaluated(options.out, found)


def _made(options: EvaluateOptions) -> dict[str, Any]:
    """What the report was made of and with."""
    return {
        "options": _plain(options),
        "data": {"path": str(options.data), "sha256": sha256_of(options.data)},
        "base": base_facts(options.model),
        "versions": versions(),
    }


def _plain(options: EvaluateOptions) -> dict[str, Any]:
    return {
        name: os.fspath(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in asdict(options).items()
    }
