"""English prose taken apart: sentences, words, syllables, and the school grade that it asks of its reader."""

import re
from collections.abc import Iterable

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
# A full stop after these ends no sentence.
_SHORT = r"(?:\b(?:dr|mr|mrs|ms|prof|st|vs|etc|inc|no|approx|dept|e\.g|i\.e|a\.m|p\.m|u\.s)|\b[a-z])\.$"
_SHORTENED = re.compile(_SHORT, re.IGNORECASE)
_END = re.compile(r"[.!?…][\"'”’)\]*_]*(?=\s)")
_ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+")
_FINISHED = re.compile(r"[.!?…][\"'”’)\]*_]*$")
_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?:[^laeiouy]es|[^dt]ed|[^laeiouy]e|[aeiouy]le)$")  # endings that add no syllable of their own
_COMPOUND = re.compile(r"(?:care|home|some|time|life|there|where|safe|like|wide|use)(?=[^aeiouy]+[aeiouy])")
_PARTED = re.compile(
    r"ia(?!l|n\b)|io(?!n|us)|eo(?!pl|n)|iu|eing|ired$|ua(?!r)|uou|[^aeiouq]ue[lnt]|ie[rt]|ying|[^st]ism$|thms?$"
)


def plain(text: str) -> str:
    """A text in lower case and with straight apostrophes, as word lists are written."""
    return text.lower().replace("’", "'")


def opening(text: str, count: int) -> str:
    """The first few words of a text, in plain letters."""
    return " ".join(words(plain(text[:400]))[:count])


def either(patterns: Iterable[str]) -> re.Pattern[str]:
    """One pattern for what any of several finds."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def words(text: str) -> list[str]:
    """The words of a text, with the hyphens and apostrophes inside them."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text; a line ends one too, and an item of a list is one without its mark."""
    found: list[str] = []
    for line in text.splitlines():
        line, start = _ITEM.sub("", line).strip(), 0
        for end in _END.finditer(line):
            if not _SHORTENED.search(line[start : end.end()]):
                found.append(line[start : end.end()].lstrip())
                start = end.end()
        found.append(line[start:].lstrip())
    return [sentence for sentence in found if words(sentence)]


def is_finished(text: str) -> bool:
    """Whether a text ends as a sentence does, and not in the middle of one."""
    return bool(_FINISHED.search(text.rstrip()))


def syllables(word: str) -> int:
    """How many syllables an English word has, by its letters; at least one."""
    letters = re.sub(r"[^a-z]", "", word.lower())
    if not letters:
        return max(1, len(re.sub(r"\D", "", word)))  # a figure is read out digit by digit or shorter
    groups = len(_VOWELS.findall(letters)) + len(_PARTED.findall(letters))
    groups -= bool(_COMPOUND.match(letters))
    if len(letters) > 2 and _SILENT.search(letters) and groups > 1:
        groups -= 1
    return max(1, groups)


def grade(text: str) -> float:
    """The Flesch-Kincaid grade: 0.39 words a sentence + 11.8 syllables a word - 15.59; 0 for no words.

    Kincaid et al. 1975.
    """
    said = words(text)
    if not said:
        return 0.0
    return 0.39 * len(said) / len(sentences(text)) + 11.8 * sum(map(syllables, said)) / len(said) - 15.59
