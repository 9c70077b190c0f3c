"""How the answers of a set of pairs are worded: their openings, lengths, endings, tone, detail and safety."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from mlx_dpo.care.replies import objections
from mlx_dpo.data.audit.findings import SHOWN, Finding, Shown, Subject, level
from mlx_dpo.prose import either, is_finished, opening, plain, words

_LEXICON = Path(__file__).with_name("lexicon.toml")
_SAME_OPENING = (0.15, 0.4)  # of the answers of one side
_LONGER, _UNFINISHED, _HOSTILE, _SPECIFIC, _STYLE = 0.7, 0.05, 0.1, 2.0, 0.05


@cache
def lexicon() -> dict[str, re.Pattern[str]]:
    """The word lists of lexicon.toml, each as one pattern for texts in lower case."""
    table = tomllib.loads(_LEXICON.read_text(encoding="utf-8"))
    return {name: either(texts) for name, texts in table.items()}


def wording(subject: Subject) -> Iterator[Finding]:
    """Every finding about the wording."""
    for side, texts in (("chosen", subject.chosen), ("rejected", subject.rejected)):
        yield _openers(side, texts)
    yield _length_gap(subject)
    for side, texts in (("chosen", subject.chosen), ("rejected", subject.rejected)):
        yield endings(side, texts, subject.sources)
    yield _hostility(subject)
    yield _specificity(subject)
    yield from _styles(subject)
    yield _safety(subject)


def _openers(side: str, texts: Sequence[str]) -> Finding:
    openings = Counter(opening(text, 2) for text in texts)
    common = openings.most_common(5)
    entropy = -sum(n / len(texts) * math.log2(n / len(texts)) for n in openings.values())
    shares = {first: n / len(texts) for first, n in common}
    top = next(iter(shares.values()))
    listed = ", ".join(f"{share:.0%} “{first}”" for first, share in shares.items() if share >= 0.02)
    sentence = f"{side.capitalize()} answers begin in {len(openings)} ways ({entropy:.1f} bits)"
    sentence += f": {listed}." if listed else "."
    numbers = {"entropy_bits": entropy, **{f"opening {first!r}": share for first, share in shares.items()}}
    return Finding(f"openers: {side}", level(top, *_SAME_OPENING) if len(texts) > 1 else "ok", sentence, numbers)


def _length_gap(subject: Subject) -> Finding:
    counts = [(len(words(a)), len(words(b))) for a, b in zip(subject.chosen, subject.rejected, strict=True)]
    longer = fmean(b > a for a, b in counts)
    means = fmean(a for a, _ in counts), fmean(b for _, b in counts)
    sentence = f"Rejected answers are longer in {longer:.0%} of pairs; means: {means[1]:.0f} and {means[0]:.0f} words."
    numbers = {"rejected_longer": longer, "chosen_words": means[0], "rejected_words": means[1]}
    return Finding("length gap", level(max(longer, fmean(a > b for a, b in counts)), _LONGER), sentence, numbers)


def endings(side: str, texts: Sequence[str], sources: Sequence[str]) -> Finding:
    """How many texts stop in the middle of a sentence."""
    cut = [i for i, text in enumerate(texts) if not is_finished(text)]
    share = len(cut) / len(texts)
    shown = tuple(Shown(sources[i], "… " + texts[i].rstrip()[-60:]) for i in cut[:SHOWN])
    sentence = f"{share:.0%} of {side} answers stop in the middle of a sentence."
    return Finding(f"endings: {side}", level(share, _UNFINISHED), sentence, {"unfinished": share}, shown)


def _hostility(subject: Subject) -> Finding:
    pattern = lexicon()["hostile"]
    found = {
        side: [(i, match) for i, text in enumerate(texts) if (match := pattern.search(plain(text)))]
        for side, texts in (("chosen", subject.chosen), ("rejected", subject.rejected))
    }
    count = len(subject.prompts)
    numbers = {side: len(rows) / count for side, rows in found.items()}
    sentence = f"{numbers['rejected']:.0%} of rejected answers insult the asker, {numbers['chosen']:.0%} of chosen ones"
    for word, _ in Counter(match.group() for _, match in found["rejected"]).most_common(1):
        share = sum(word in plain(text) for text in subject.rejected) / count
        numbers[f"rejected with {word!r}"] = share
        sentence += f"; {share:.0%} of rejected ones say “{word}”"
    rows = found["chosen"][:2] + found["rejected"]
    grave = level(max(numbers["chosen"], numbers["rejected"]), _HOSTILE)
    return Finding("hostility", grave, f"{sentence}.", numbers, _around(subject, rows))


def _around(subject: Subject, rows: list[tuple[int, re.Match[str]]]) -> tuple[Shown, ...]:
    return tuple(
        Shown(subject.sources[i], f"… {match.string[max(0, match.start() - 30) : match.end() + 30]} …")
        for i, match in rows[:SHOWN]
    )


def _specificity(subject: Subject) -> Finding:
    numbers: dict[str, float] = {}
    ratios = {}
    for name in ("drugs", "numbers", "clinicians"):
        pattern = lexicon()[name]
        rates = []
        for texts in (subject.chosen, subject.rejected):
            total = sum(len(words(text)) for text in texts)
            rates.append(100 * sum(len(pattern.findall(plain(text))) for text in texts) / max(total, 1))
        numbers |= {f"{name} per 100 words, chosen": rates[0], f"{name} per 100 words, rejected": rates[1]}
        ratios[name] = (rates[1] + 0.05) / (rates[0] + 0.05)
    listed = ", ".join(
        f"{name} {numbers[f'{name} per 100 words, chosen']:.2f} and {numbers[f'{name} per 100 words, rejected']:.2f}"
        for name in ratios
    )
    gap = max(max(ratio, 1 / ratio) for ratio in ratios.values())
    sentence = f"In 100 words, chosen and rejected: {listed}."
    return Finding("specificity gap", level(gap, _SPECIFIC), sentence, numbers)


def _styles(subject: Subject) -> Iterator[Finding]:
    for name, words_of_it in (("first person", "speak in the first person"), ("emotion", "tell of a feeling")):
        pattern = lexicon()[name]
        rows = [i for i, prompt in enumerate(subject.prompts) if pattern.search(plain(prompt))]
        share = len(rows) / len(subject.prompts)
        sentence = f"{share:.1%} of the questions {words_of_it}, as caregivers do."
        shown = subject.shown(rows, subject.prompts)
        yield Finding(f"style: {name}", "warn" if share < _STYLE else "ok", sentence, {"share": share}, shown)


def _safety(subject: Subject) -> Finding:
    found = [
        Shown(source, f"{objection.rule.words}: {objection.sentence}")
        for source, prompt, answer in zip(subject.sources, subject.prompts, subject.chosen, strict=True)
        for objection in objections(answer, prompt)
    ]
    rows = len({shown.source for shown in found})
    sentence = f"{rows} chosen answers say what the care rules forbid (rules that no clinician has reviewed)."
    numbers = {"rows": float(rows), "share": rows / len(subject.prompts)}
    return Finding("safety of chosen", "fail" if found else "ok", sentence, numbers, tuple(found))
