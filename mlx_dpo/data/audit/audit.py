"""The audit of a set of preference pairs: every check, one after the other."""

from collections.abc import Sequence
from typing import NamedTuple

from mlx_dpo.data.asked import Asked
from mlx_dpo.data.audit.copies import Encode, contamination, duplicates, near_duplicates
from mlx_dpo.data.audit.findings import Finding, Subject
from mlx_dpo.data.audit.probes import probes
from mlx_dpo.data.audit.wording import endings, wording
from mlx_dpo.data.examples import Example
from mlx_dpo.refusal import Refusal

_MARKS = {"fail": "FAIL", "warn": "WARN", "ok": "ok"}


class Audited(NamedTuple):
    """All findings about so many pairs; `notes` say what was not looked at."""

    pairs: int
    findings: list[Finding]
    notes: list[str]

    @property
    def fails(self) -> bool:
        """Whether anything is so wrong that the pairs should not be learnt as they are."""
        return any(finding.level == "fail" for finding in self.findings)


def audited(pairs: Sequence[Example], against: Sequence[Asked] = (), encode: Encode | None = None) -> Audited:
    """Audit pairs, against a test's questions where there are any; by meaning too where there is an encoder.

    Raises Refusal for no pairs.
    """
    if not pairs:
        raise Refusal("There are no pairs to audit: give a file with prompt, chosen and rejected.")
    subject = Subject(
        [pair.prompt[-1]["content"] for pair in pairs],
        [pair.chosen or "" for pair in pairs],
        [pair.rejected or "" for pair in pairs],
        [pair.source for pair in pairs],
    )
    findings = [*probes(subject), *duplicates(subject)]
    notes = []
    if encode is not None:
        findings.append(near_duplicates(subject, encode))
    else:
        notes.append("Near-duplicates by meaning were not looked for: there is no sentence encoder (see --encoder).")
    if against:
        findings += contamination(subject, [asked.question for asked in against], encode)
        answered = [asked for asked in against if asked.reference is not None]
        if answered:
            texts, sources = [asked.reference or "" for asked in answered], [asked.source for asked in answered]
            findings.append(endings("test", texts, sources))
    return Audited(len(pairs), findings + list(wording(subject)), notes)


def in_words(found: Audited) -> str:
    """The audit as a report to read: a line a check, with rows that show what it means."""
    counts = {mark: sum(finding.level == grave for finding in found.findings) for grave, mark in _MARKS.items()}
    lines = [f"{found.pairs} pairs: " + ", ".join(f"{count} {mark}" for mark, count in counts.items()), ""]
    for finding in found.findings:
        lines.append(f"{_MARKS[finding.level]:4}  {finding.check}: {finding.sentence}")
        if finding.level != "ok":
            lines += [f"        {shown.source}: {_shortened(shown.text)}" for shown in finding.examples[:3]]
    return "\n".join([*lines, *([""] if found.notes else []), *found.notes])


def as_json(found: Audited) -> dict[str, object]:
    """The audit as one JSON object."""
    return {
        "pairs": found.pairs,
        "fails": found.fails,
        "findings": [finding.as_json() for finding in found.findings],
        "notes": found.notes,
    }


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:159] + "…"
