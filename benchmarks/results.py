"""RESULTS.md: one section a machine and device, written anew when that machine measures again."""

from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.arithmetic import least_operations
from benchmarks.cases import CASES, LORA, OURS, ROWS, TRL, Case, Row, Setting, pairs_of, value
from benchmarks.pairs import lengths
from benchmarks.peers.job import AROUND, BATCH, TOKENS, TURNS, Result

RESULTS = Path(__file__).with_name("RESULTS.md")
_ANSWER_AIM = 0.98
_HEAD = """# Results

Made by `make bench`; a section a machine and device. All learn from the same pairs in the same batches of 4, from the
same weights, with plain DPO (sigmoid, beta 0.1), LoRA of rank 8 and scale 2 on all linear layers of the blocks, and
AdamW without weight decay or clipping, in a process of their own, in turn. Each ratio is the median over the rounds of
that round's ratio; beside it stands what is aimed at.
"""
_NOTES = """\
An epoch includes the reference: mlx_dpo scores all pairs once, before the first step; the others score each batch in
its step. mlx-lm-lora keeps no reference numbers, so its time is the same in both. Not timed are what comes once a run
(loading, a first step to warm up, mlx_dpo's check of the start on one batch, saving), and what TRL computes ahead of a
run with a cached reference. mlx-lm-lora compiles its
step anew for each length of batch. It runs with two changes: its batches come in the order of the pairs, where it
draws them at random, and `mx.device_info` is patched to name a working set (the machine's memory) also off Metal,
without which it does not start; on Linux it has OpenBLAS as mlx_dpo has. It holds a second copy of the model as its
reference, and scores chosen and rejected answers one after the other, padded to one length."""


class Measured(NamedTuple):
    """What the rounds gave: the device's limit in each, each case's results by contestant, what failed, the answers."""

    limits: list[dict[str, Any]]
    rounds: dict[str, list[dict[str, Result]]]
    failures: dict[str, str]
    answers: dict[str, Any] | None


class About(NamedTuple):
    """What was measured on: the runs' setting, the model, its configuration and tokenizer, the data, the format."""

    setting: Setting
    model: str
    config: dict[str, Any]
    tokenizer: Any
    data: str
    kind: str


def write(found: Measured, about: About, *, with_lora: bool) -> str:
    """Put this machine's section into RESULTS.md in the place of its former one, and return it."""
    section = _section(found, about, with_lora)
    heading = section.splitlines()[0]
    before = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:] if RESULTS.exists() else []
    kept = [f"## {part.rstrip()}\n" for part in before if f"## {part}".splitlines()[0] != heading]
    RESULTS.write_text("\n".join([_HEAD, *kept, section]), encoding="utf-8")
    return section


def _section(found: Measured, about: About, with_lora: bool) -> str:
    machine = found.limits[0]["machine"]
    limit = median(each["limit"] for each in found.limits)
    tables = [_speed(found), _memory(found), _shares(found, about), _sameness(found), _answers(found)]
    failures = [f"{who} failed: {why}" for who, why in found.failures.items()]
    return "\n".join(
        [
            f"## {machine['name']}, {machine['cores']} cores, {machine['device']}, {machine['blas']}",
            "",
            f"{date.today()}, {machine['system']}, {machine['memory'] / 1e9:.0f} GB; {_versions(found)}.",
            f"{_model(about)} in {about.kind}, pairs from {about.data}: {_tokens(about)} tokens.",
            f"A product of {found.limits[0]['product']} matrices in MLX reaches {limit / 1e9:,.0f} GFLOP/s.",
            "",
            *(line for table in tables if table for line in [*table, ""]),
            *(line for failure in failures for line in [failure, ""]),
            *([_NOTES, ""] if with_lora else []),
        ]
    )


def _speed(found: Measured) -> list[str]:
    rows = [line for row in ROWS if not row.is_memory and (line := _line(found, row, "{:.3g}"))]
    return [*_heads("pairs a second", "time, other / ours"), *rows] if rows else []


def _memory(found: Measured) -> list[str]:
    rows = [line for row in ROWS if row.is_memory and (line := _line(found, row, "{:.2f}"))]
    return [*_heads("peak, GB", "ours / other"), *rows] if rows else []


def _heads(unit: str, ratio: str) -> list[str]:
    names = f"{unit} | {OURS} | {LORA} | {TRL} | {ratio}: {LORA} (aim) | {ratio}: {TRL} (aim) | rounds"
    return [f"| {names} |", "|" + "---|" * 7]


def _line(found: Measured, row: Row, form: str) -> str | None:
    rounds = found.rounds[row.case]
    cells, ratios = [], []
    for contestant in (OURS, *row.others):
        numbers = [number for each in rounds if contestant in each and (number := value(each[contestant], row))]
        cells.append(form.format(median(numbers)) if numbers else "–")
    if cells[0] == "–":
        return None
    sign = "≤" if row.is_memory else "≥"
    for other, aim in zip(row.others, row.aims, strict=True):
        # Both are rates or both are amounts, so ours / other is how many times as fast, or how much of the memory.
        both = [(value(each[OURS], row), value(each[other], row)) for each in rounds if {OURS, other} <= each.keys()]
        quotients = [ours / theirs for ours, theirs in both if ours and theirs]
        ratios.append(f"{median(quotients):.2f} ({sign} {aim:g})" if quotients else f"– ({sign} {aim:g})")
    return f"| {row.words} | {' | '.join(cells + ratios)} | {len(rounds)} |"


def _shares(found: Measured, about: About) -> list[str]:
    lines = []
    for case in CASES:
        if case.grad_checkpoint or not found.rounds[case.name]:
            continue
        operations = _timed_operations(case, about)
        cells = []
        for contestant in (OURS, LORA, TRL):
            # A case's n-th round is the n-th of all.
            shares = [
                operations / sum(each[contestant].seconds) / limit["limit"]
                for each, limit in zip(found.rounds[case.name], found.limits, strict=False)
                if contestant in each
            ]
            cells.append(f"{median(shares):.0%}" if shares else "–")
        a_step = operations / case.steps(about.setting.steps) / 1e9
        lines.append(f"| {case.words} | {a_step:,.0f} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = f"share of that limit, reference cached | least GFLOP a step | {OURS} | {LORA} | {TRL}"
    return [f"| {head} |", "|" + "---|" * 5, *lines]


def _timed_operations(case: Case, about: About) -> float:
    timed = pairs_of(case, about.setting)[case.warmup * BATCH :]
    return least_operations(about.config, lengths(timed, about.tokenizer), case.layers)


def _sameness(found: Measured) -> list[str]:
    """The first steps' numbers side by side; without a warm-up run of its own, ours has taken the same steps."""
    rounds = found.rounds["memory"] or found.rounds["short"] or found.rounds["top8"]
    if not rounds or OURS not in rounds[0]:
        return []
    steps = slice(None) if found.rounds["memory"] else slice(1)
    names = [name for name in (OURS, LORA, TRL) if name in rounds[0]]
    lines = [f"| the same work: | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for words, what, form in (
        ("loss, step by step (the first is ln 2 = 0.6931)", "losses", "{:.4f}"),
        ("mean log p of the chosen answers, nats", "chosen", "{:.2f}"),
        ("mean log p of the rejected answers, nats", "rejected", "{:.2f}"),
    ):
        cells = [", ".join(form.format(number) for number in getattr(rounds[0][name], what)[steps]) for name in names]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return [*lines, "", "After the first step they differ by what each adapter's A was drawn to be."]


def _answers(found: Measured) -> list[str]:
    if found.answers is None:
        return []
    ours, other = found.answers["ours"], found.answers["other"]
    ratio = median(theirs / own for own, theirs in zip(ours, other, strict=True))
    early, late = found.answers["early"], found.answers["late"]
    return [
        f"A greedy answer of {TOKENS} tokens takes {median(ours):.2f} s in `mlx_dpo chat` and {median(other):.2f} s in",
        f"mlx_lm.generate: {ratio:.2f} of its speed (aim ≥ {_ANSWER_AIM}). The first token of an answer comes after",
        f"{early:.2f} s in turns 2 to {1 + AROUND} of a conversation and after {late:.2f} s in turns "
        f"{TURNS - AROUND + 1} to {TURNS}: {late / early:.2f} times as long.",
    ]


def _versions(found: Measured) -> str:
    every = [result.versions for rounds in found.rounds.values() for each in rounds for result in each.values()]
    return "; ".join(dict.fromkeys(every)) or "no training step"


def _model(about: About) -> str:
    return f"{about.model} ({about.config['num_hidden_layers']} blocks of width {about.config['hidden_size']})"


def _tokens(about: About) -> str:
    def words(rows: Any) -> str:
        found = lengths(rows, about.tokenizer)
        return f"{median(p.prompt for p in found):.0f} + {median(n for p in found for n in p[1:]):.0f}"

    return f"prompt + answer are {words(about.setting.short)} in the median, {words(about.setting.long)} lengthened"
