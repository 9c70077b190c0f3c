"""A comparison in words and in Markdown: for the screen and for a model card."""

from collections.abc import Iterator
from typing import Any

from mlx_dpo.evaluation.measures import MEASURES

_NAMES = {measure.name: measure.words for measure in MEASURES}
_ARROWS = {measure.name: measure.arrow for measure in MEASURES}
CAUTION = (
    "Measures of tone count words and can be learnt by heart; care rules have not been reviewed by a clinician; a "
    "difference that is not clear is not shown to be none."
)


def in_words(found: dict[str, Any]) -> str:
    """The comparison as a table of means with intervals, floors below, and what is clear of chance."""
    tables = found["all"]
    lines = [f"{tables['questions']} questions; means with 95% intervals", ""]
    lines += _table({**tables["systems"], **{f"({name})": of for name, of in tables["floors"].items()}}, cell=_cell)
    lines += ["", *_conclusions(tables)]
    if "near_questions" in found:
        lines.append(f"{found['near_questions']} questions have a near neighbour among the pairs that were learnt.")
    if "far" in found:
        lines += [f"Without them ({found['far']['questions']} questions):", *_conclusions(found["far"])]
    return "\n".join([*lines, *verdict(found), *found["notes"], CAUTION])


def card(found: dict[str, Any], options: dict[str, Any]) -> str:
    """A model card's section on the evaluation, in Markdown."""
    tables = found["all"]
    rows = {**tables["systems"], **{f"floor: {name}": of for name, of in tables["floors"].items()}}
    names = [name for name in _NAMES if any(name in of for of in rows.values())]
    lines = [
        "## Evaluation",
        "",
        f"{tables['questions']} questions of {options['data']}, the same prompt for all, greedy answers of at most "
        f"{options['max_tokens']} tokens; means with 95% bootstrap intervals over questions.",
        "",
        "| | " + " | ".join(f"{_NAMES[name]}{_ARROWS[name]}" for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for who, of in rows.items():
        lines.append(f"| {who} | " + " | ".join(_cell(of[name]) if name in of else "–" for name in names) + " |")
    said = [f"- {line}" for line in [*_conclusions(tables), *verdict(found)]]
    return "\n".join([*lines, "", *said, "", CAUTION, ""])


def verdict(found: dict[str, Any]) -> list[str]:
    """What the judge said, or why it is not said, a sentence each; nothing where there was no judge."""
    if "judge" not in found:
        return []
    said = found["judge"]
    scores = ", ".join(f"{name} {score:.2f}" for name, score in said["controls"].items())
    if said["withheld"]:
        return [f"The judge's numbers are withheld, since its {reason}." for reason in said["withheld"]]
    lines = [f"The judge passed its controls ({scores})."]
    for win in said["wins"]:
        rate = win["balanced"]
        lines.append(
            f"{win['system']} against {win['against']}: preferred {rate['mean']:.0%} ({rate['low']:.0%} to "
            f"{rate['high']:.0%}) over both orders, {win['raw']:.0%} in one, "
            f"{win['length_controlled']:.0%} at equal length."
        )
    for name, of in said["systems"].items():
        parts = [f"{what.replace('_', ' ')} {_cell(value)}" for what, value in of.items()]
        lines.append(f"{name}: {', '.join(parts)}.")
    return lines


def _conclusions(tables: dict[str, Any]) -> list[str]:
    return [line for entry in tables["differences"] for line in _conclusion(entry)]


def _conclusion(entry: dict[str, Any]) -> Iterator[str]:
    measure = entry["measure"]
    if entry["p_holm"] is None and "margin" not in entry:
        return
    change = f"{entry['mean']:+.3g} ({entry['low']:+.3g} to {entry['high']:+.3g})"
    head = f"{entry['system']} against {entry['against']}, {_NAMES[measure]}: {change}"
    if "margin" in entry:
        yield f"{head}: {'no worse by' if entry['no_worse'] else 'not shown to be no worse by'} {entry['margin']:g}"
        return
    words = {"yes": "better", "no": "worse", "unclear": "not clear"}[entry["better"]]
    seen = f"; {entry['detectable']:.2g} could be seen" if words == "not clear" else ""
    yield f"{head}: {words} (p {entry['p_holm']:.2g} after Holm{seen})"


def _cell(of: dict[str, float]) -> str:
    return f"{of['mean']:.3g} ({of['low']:.3g} to {of['high']:.3g})"


def _table(rows: dict[str, Any], cell: Any) -> list[str]:
    lines = []
    for name in _NAMES:
        if any(name in of for of in rows.values()):
            lines.append(f"{_NAMES[name]}{_ARROWS[name]}")
            lines += [f"  {who:28} {cell(of[name])}" for who, of in rows.items() if name in of]
    return lines
