"""Examples as token ids, cut to length where asked, with every cut counted."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlx_dpo.data.examples import Example
from mlx_dpo.data.problems import Problem, refusal
from mlx_dpo.data.templates import Message, Tokenizer, UnusableTokenizer, conversation_ids, prompt_ids, text_ids
from mlx_dpo.refusal import Refusal

# Two texts that share no beginning and no end: what stays the same around both is the template's.
_PROBES = ("0", "x")


class TokenisedPair(NamedTuple):
    """The tokens of a prompt and of its answers, end of turn included; a missing answer is [].

    Of plain text, `prompt` is the first token of a piece and `chosen` all others.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: str

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class CutCounts(NamedTuple):
    """Examples that were cut, prompts and answers shortened in them, and tokens lost (a prompt's once)."""

    pairs: int = 0
    prompts: int = 0
    responses: int = 0
    tokens: int = 0


class Tokenised(NamedTuple):
    """All examples in their order, long texts in several pieces, and what cutting to length took away."""

    items: list[TokenisedPair]
    cut: CutCounts


def tokenise(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int | None) -> Tokenised:
    """Tokenise by the model's chat template; a prompt and its longer answer take at most `max_length` tokens.

    A prompt gives way first: tokens go from its left, but after BOS, system turn and the opening of its first
    turn, and none of the template's closing. The end of an answer goes only where that is not enough. Plain text
    needs no template and loses nothing: it is parted, and each piece but the first opens with the last token of
    the one before, so that every token but a text's first is predicted exactly once.

    Raises Refusal with every row that cannot be learnt: where the finished conversation does not continue the
    prompt token for token, where an answer holds no token, where both come out the same, where nothing fits.
    """
    closing = _closing(tokenizer) if any(example.prompt for example in examples) else []
    items: list[TokenisedPair] = []
    problems: list[Problem] = []
    cuts: list[CutCounts] = []
    for example in examples:
        try:
            if not example.prompt:
                items += _pieces(example, tokenizer, max_length)
                continue
            whole = _pair(example, tokenizer, closing)
            fitting = _fitting(whole, example, tokenizer, max_length)
        except UnusableTokenizer:
            raise
        except Refusal as fault:
            problems.append(Problem(example.source, str(fault).rstrip(".")))
            continue
        items.append(fitting)
        if fitting is not whole:
            cuts.append(_lost(whole, fitting))
    if problems:
        raise refusal(problems)
    return Tokenised(items, CutCounts(*map(sum, zip(*cuts, strict=True))) if cuts else CutCounts())


def _pair(example: Example, tokenizer: Tokenizer, closing: list[int]) -> TokenisedPair:
    prompt = prompt_ids(tokenizer, example.prompt)
    answers: dict[str, list[int]] = {}
    for name, text in (("chosen", example.chosen), ("rejected", example.rejected)):
        if text is not None:
            answers[name] = _response(name, text, example.prompt, prompt, tokenizer)
            if answers[name] in ([], closing):
                raise Refusal(f"{name} has no token of its own")
    chosen, rejected = answers.get("chosen", []), answers.get("rejected", [])
    if chosen == rejected:
        raise Refusal("chosen and rejected are the same tokens")
    return TokenisedPair(prompt, chosen, rejected, example.source)


def _pieces(example: Example, tokenizer: Tokenizer, max_length: int | None) -> list[TokenisedPair]:
    ids = text_ids(tokenizer, example.chosen or "")
    if max_length is not None and max_length < 2:
        raise Refusal(f"--max-length {max_length} leaves no room for a token and the next, so raise it")
    # A piece repeats one token of the piece before, so it adds one less than it holds.
    new = (max_length or len(ids)) - 1
    starts = range(0, len(ids) - 1, new)
    return [TokenisedPair([ids[i]], ids[i + 1 : i + 1 + new], [], example.source) for i in starts]


def _response(name: str, text: str, messages: Sequence[Message], prompt: list[int], tokenizer: Tokenizer) -> list[int]:
    whole = conversation_ids(tokenizer, [*messages, Message(role="assistant", content=text)])
    same = _same_beginning(prompt, whole)
    if same == len(prompt):
        return whole[same:]
    raise Refusal(
        f"the prompt with {name} does not continue the prompt token for token (they part at token {same + 1} of "
        f"{len(prompt)}): {name} starts with white space that merges with the prompt's last token, or this chat "
        "template renders an answered prompt otherwise"
    )


def _closing(tokenizer: Tokenizer) -> list[int]:
    """What the template adds after an answer of no text; [] where it will not say."""
    question = Message(role="user", content=_PROBES[1])
    try:
        prompt = prompt_ids(tokenizer, [question])
        return conversation_ids(tokenizer, [question, Message(role="assistant", content="")])[len(prompt) :]
    except UnusableTokenizer:
        raise
    except Refusal:
        return []


def _fitting(pair: TokenisedPair, example: Example, tokenizer: Tokenizer, max_length: int | None) -> TokenisedPair:
    if max_length is None or pair.longest <= max_length:
        return pair
    head, tail = _frame(example.prompt, pair.prompt, tokenizer)
    if head + tail >= max_length:
        raise Refusal(
            f"--max-length {max_length} leaves no room for an answer: system text and chat template take "
            f"{head + tail} tokens, so raise it"
        )
    kept = max(max_length - (pair.longest - len(pair.prompt)), head + tail) - head
    prompt = pair.prompt[:head] + pair.prompt[len(pair.prompt) - kept :]
    room = max_length - len(prompt)
    cut = pair._replace(prompt=prompt, chosen=pair.chosen[:room], rejected=pair.rejected[:room])
    if cut.chosen == cut.rejected:
        raise Refusal(f"--max-length {max_length} cuts chosen and rejected to the same tokens, so raise it")
    return cut


def _frame(messages: Sequence[Message], prompt: list[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens stand before the text of the first turn, and how many after that of the last."""
    first = 1 if messages[0]["role"] == "system" else 0
    head = min(_same_beginning(prompt, other) for other in _probed(messages, first, tokenizer))
    tail = min(_same_beginning(prompt[::-1], other[::-1]) for other in _probed(messages, len(messages) - 1, tokenizer))
    return head, tail


def _probed(messages: Sequence[Message], place: int, tokenizer: Tokenizer) -> Iterable[list[int]]:
    for text in _PROBES:
        turn = messages[place].copy()
        turn["content"] = text
        yield prompt_ids(tokenizer, [*messages[:place], turn, *messages[place + 1 :]])


def _same_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    for count, (mine, yours) in enumerate(zip(first, second, strict=False)):
        if mine != yours:
            return count
    return min(len(first), len(second))


def _lost(whole: TokenisedPair, cut: TokenisedPair) -> CutCounts:
    prompt = len(whole.prompt) - len(cut.prompt)
    answers = [len(whole.chosen) - len(cut.chosen), len(whole.rejected) - len(cut.rejected)]
    return CutCounts(1, int(prompt > 0), sum(lost > 0 for lost in answers), prompt + sum(answers))
