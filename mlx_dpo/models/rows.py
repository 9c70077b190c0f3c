"""Answers laid out for the forward pass: prompts once, answers in pieces of like length, all scored places known."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

WASTE = 0.05  # of padding in the tokens computed; more pieces are made until there is less


class Said(NamedTuple):
    """The tokens of a prompt and of its answer; `lead` of the prompt's last tokens are scored too."""

    prompt: Sequence[int]
    answer: Sequence[int]
    lead: int = 0


Text = tuple[Sequence[int], Sequence[int]] | Said


class Piece(NamedTuple):
    """Token rows computed together, padded on the right, each going on from a prompt.

    tokens: (rows, length) int32. prompt_of: (rows,) int32, or None where the rows hold their prompts themselves.
    texts: the number of each row's text.
    """

    tokens: mx.array
    prompt_of: mx.array | None
    texts: list[int]


class Block(NamedTuple):
    """Prompts and the pieces that go on from them; blocks do not depend on each other.

    prompts: (prompts, length) int32, padded on the right, or None where nothing is shared; lengths: (prompts,) int32;
    prompt_texts: the number of a text that has the prompt, for each.
    """

    prompts: mx.array | None
    lengths: mx.array | None
    prompt_texts: list[int]
    pieces: list[Piece]

    @property
    def computed(self) -> int:
        """Tokens that the forward pass goes over, padding included."""
        return sum(piece.tokens.size for piece in self.pieces) + (0 if self.prompts is None else self.prompts.size)


class Rows(NamedTuple):
    """Blocks of texts, and the places that predict the scored tokens.

    places: (scored,) positions whose output predicts `targets`, in the outputs of all blocks flattened, each block's
    prompts before its pieces. targets, row_of, ordinals: (scored,) int32, the token predicted, the row it belongs to
    and its number among that row's scored tokens, from 0. said: the texts themselves, one a row; tokens: how many
    they have, equal prompts counted once where they are shared.
    """

    blocks: list[Block]
    places: mx.array
    targets: mx.array
    row_of: mx.array
    ordinals: mx.array
    said: list[Said]
    tokens: int

    @property
    def waste(self) -> float:
        """Padding, as a share of the tokens that are no padding."""
        return sum(block.computed for block in self.blocks) / self.tokens - 1


def rows_of(texts: Sequence[Text], *, shared: bool = False, lanes: int = 1) -> Rows:
    """Lay texts out, the rows numbered in their order; with `shared` equal prompts of a block are computed once.

    There are as many blocks as `lanes`, of about equal size, but none is empty. Causal attention keeps padding out of
    the numbers. The last token of an answer predicts nothing and is left out.
    """
    said = [text if isinstance(text, Said) else Said(text[0], text[1]) for text in texts]
    laid = [_shared(said, some) if shared else _plain(said, some) for some in _dealt(said, shared, lanes)]
    places, offset, tokens = [np.zeros(0)] * len(said), 0, 0
    for block, found, count in laid:
        for number, at in found.items():
            places[number] = at + offset
        offset += block.computed
        tokens += count
    at = mx.array(np.concatenate(places).astype(np.int32))
    return tokens_of(said)._replace(blocks=[block for block, _, _ in laid], places=at, tokens=tokens)


def tokens_of(said: list[Said]) -> Rows:
    """The scored tokens of texts without a place, for numbers that are known already."""
    targets = [[*text.prompt[len(text.prompt) - text.lead :], *text.answer] for text in said]
    counts = [len(target) for target in targets]
    parts = (targets, [np.full(c, i) for i, c in enumerate(counts)], [np.arange(c) for c in counts])
    targets_, row_of, ordinals = (mx.array(np.concatenate(part).astype(np.int32)) for part in parts)
    return Rows([], mx.zeros((0,), dtype=mx.int32), targets_, row_of, ordinals, said, 0)


def _dealt(said: list[Said], shared: bool, lanes: int) -> list[list[int]]:
    """Texts by number, dealt out: those of a prompt together, the largest first, each to the lane with the least."""
    together: dict[Any, list[int]] = {}
    for number, text in enumerate(said):
        together.setdefault(tuple(text.prompt) if shared else number, []).append(number)
    costs = {key: sum(len(said[i].prompt) + len(said[i].answer) for i in some) for key, some in together.items()}
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    loads = [0] * lanes
    for key in sorted(together, key=lambda key: (-costs[key], together[key])):
        lane = loads.index(min(loads))
        dealt[lane] += together[key]
        loads[lane] += costs[key]
    return [sorted(some) for some in dealt if some]


def row_sums(values: mx.array, rows: Rows) -> mx.array:
    """Sums of per-token values over each row, (rows,)."""
    return mx.zeros((len(rows.said),), dtype=values.dtype).at[rows.row_of].add(values)


def grouped(lengths: Sequence[int], waste: float = WASTE) -> list[list[int]]:
    """Numbers of rows in the fewest groups of like length that waste no more than this share on padding.

    Longest first. The groups are optimal for their number; a group of one wastes nothing.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [lengths[i] for i in order]
    least = sum(sizes) * (1 + waste)
    best = [float(size) * (i + 1) for i, size in enumerate(sizes[:1] * len(sizes))]
    cuts = [[0] * len(sizes)]
    while best and best[-1] > least and len(cuts) < len(sizes):
        # best[j]: padded tokens of the first j + 1 rows in len(cuts) groups
        starts = [
            min(range(len(cuts), j + 1), key=lambda i: best[i - 1] + sizes[i] * (j + 1 - i), default=0)  # noqa: B023
            for j in range(len(sizes))
        ]
        best = [best[i - 1] + sizes[i] * (j + 1 - i) if i else best[j] for j, i in enumerate(starts)]
        cuts.append(starts)
    groups, end = [], len(sizes)
    for starts in reversed(cuts):
        start = starts[end - 1] if end else 0
        groups.append(order[start:end])
        end = start
    return [group for group in reversed(groups) if group]


_Laid = tuple[Block, dict[int, np.ndarray], int]  # a block, the places of its texts by number, tokens in it


def _plain(said: list[Said], numbers: list[int]) -> _Laid:
    inputs = {i: [*said[i].prompt, *said[i].answer[:-1]] for i in numbers}
    firsts = {i: len(said[i].prompt) - said[i].lead - 1 for i in numbers}
    pieces, places = _pieces(inputs, firsts, 0, None)
    return Block(None, None, [], pieces), places, sum(map(len, inputs.values()))


def _shared(said: list[Said], numbers: list[int]) -> _Laid:
    prompts: dict[tuple[int, ...], int] = {}
    prompt_of = {i: prompts.setdefault(tuple(said[i].prompt), len(prompts)) for i in numbers}
    tokens = _padded([list(prompt) for prompt in prompts])
    inputs = {i: list(said[i].answer[:-1]) for i in numbers if len(said[i].answer) > 1}
    padding = tokens.size - sum(map(len, prompts))
    pieces, going_on = _pieces(inputs, dict.fromkeys(inputs, 0), tokens.size, prompt_of, padding)
    places = {}
    for i in numbers:
        end = prompt_of[i] * tokens.shape[1] + len(said[i].prompt)
        places[i] = np.append(np.arange(end - said[i].lead - 1, end), going_on.get(i, []))
    lengths = mx.array([len(prompt) for prompt in prompts], dtype=mx.int32)
    firsts = {prompt: i for i, prompt in reversed(prompt_of.items())}
    return (
        Block(mx.array(tokens), lengths, [firsts[p] for p in range(len(prompts))], pieces),
        places,
        sum(map(len, prompts)) + sum(map(len, inputs.values())),
    )


def _pieces(
    inputs: dict[int, list[int]],
    firsts: dict[int, int],
    offset: int,
    prompt_of: dict[int, int] | None,
    wasted: float = 0.0,
) -> tuple[list[Piece], dict[int, np.ndarray]]:
    """Pieces of input rows by number, and each row's places from its first scored one on, flattened after `offset`.

    `wasted` tokens of padding are in the block already, and count.
    """
    pieces, places, numbers = [], {}, list(inputs)
    tokens_given = sum(len(row) for row in inputs.values()) or 1
    for group in grouped([len(row) for row in inputs.values()], max(0.0, WASTE - wasted / tokens_given)):
        some = [numbers[place] for place in group]
        tokens = _padded([inputs[i] for i in some])
        for row, i in enumerate(some):
            places[i] = offset + row * tokens.shape[1] + np.arange(firsts[i], len(inputs[i]))
        of = None if prompt_of is None else mx.array([prompt_of[i] for i in some], dtype=mx.int32)
        pieces.append(Piece(mx.array(tokens), of, some))
        offset += tokens.size
    return pieces, places


def _padded(rows: list[list[int]]) -> np.ndarray:
    tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return tokens
