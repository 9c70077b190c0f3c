"""Answers as Markdown, while they are still growing."""

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment

_FENCE = "```"
# HTML is shown as the text that it is: rich would leave it out.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def markdown(text: str) -> Markdown:
    """Markdown for rich that loses nothing: lines stay lines, HTML is text, links show their target."""
    result = Markdown("", hyperlinks=False, justify="default")
    result.parsed = _PARSER.parse(text)
    for token in result.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return result


def settled(text: str) -> int:
    """How many characters of a growing Markdown text no later word can change: up to where a paragraph began.

    A code block is one piece, and so is a list's point with what is indented under it.
    """
    end = text.rfind("\n\n")
    while end > 0:
        following = text[end:].lstrip("\n")
        if following and not following[0].isspace() and text.count(_FENCE, 0, end) % 2 == 0:
            return len(text) - len(following)
        end = text.rfind("\n\n", 0, end)
    return 0


class Block:
    """A piece of Markdown without blank lines around it, or only as much of its end as fits."""

    def __init__(self, text: str, width: int, *, growing: bool = False) -> None:
        """Show `text` at most `width` columns wide; rich's Live cannot scroll, so what grows has to fit."""
        self._text = text
        self._width = width
        self._growing = growing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        narrow = options.update(width=min(options.max_width, self._width), height=None)
        lines = console.render_lines(markdown(self._text), narrow, pad=False)
        while lines and _blank(lines[0]):
            del lines[0]
        while lines and _blank(lines[-1]):
            del lines[-1]
        room = max(options.size.height - 2, 1) if self._growing else len(lines)
        for line in lines[-room:] if room else ():
            yield from line
            yield Segment.line()


def _blank(line: list[Segment]) -> bool:
    return not "".join(segment.text for segment in line).strip()
