"""A mistake planted into a right answer, so that the tone stays and the fact does not."""

import re

_OPPOSITES = (
    (r"\b(can|should|will|may|is|are|do|does)\b(?! not|n't)", r"\1 not"),
    (r"\b(always|Always)\b", "never"),
    (r"\b(never|Never)\b", "always"),
    (r"\b(help|helps)\b", "harm"),
)


def with_error(text: str) -> str:
    """The text with its first number ten times as large, or with an opposite somewhere; the same where neither is."""
    number = re.search(r"\b\d+\b", text)
    if number:
        return f"{text[: number.start()]}{int(number.group()) * 10}{text[number.end() :]}"
    for pattern, instead in _OPPOSITES:
        changed = re.sub(pattern, instead, text, count=1)
        if changed != text:
            return changed
    return text
