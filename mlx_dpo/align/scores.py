"""Log-probabilities of answers: of a batch within the gradient, and of whole data sets, taken once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.align.reference import Remembered
from mlx_dpo.data.batches import by_length
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.forward import Forward, States
from mlx_dpo.models.group import Group
from mlx_dpo.models.rows import Rows, Said, row_sums, tokens_of

_ALONE = Group()
OPENING = 5  # tokens; where a shortcut shows, if one was learnt


class Sums(NamedTuple):
    """How an answer's tokens are summed up.

    `ld_alpha` weighs the tokens beyond the shorter answer of the pair (LD-DPO); `whole` sums over the prompt too;
    `confidence` takes WPO's weights.
    """

    ld_alpha: float | None = None
    whole: bool = False
    confidence: bool = False


class Answers(NamedTuple):
    """Numbers of answers, (answers,) float32 each: sums of log p over tokens in nats.

    `logps` is weighed by place where LD-DPO asks for it, `plain` never is; `whole` includes the prompt; `opening` has
    the first five tokens only; `confidence` is WPO's weight. What is not asked for holds 0, or 1 as a weight.
    """

    logps: Any
    plain: Any
    whole: Any
    opening: Any
    confidence: Any

    def part(self, wanted: Any) -> "Answers":
        """The answers that an index or a slice picks."""
        return Answers(*(values[wanted] for values in self))


class Scores(NamedTuple):
    """The numbers of the chosen answers and of the rejected ones; a side that is not there is empty."""

    chosen: Answers
    rejected: Answers


class Progress(NamedTuple):
    """How far a pass over the data has come."""

    done: int
    total: int


def having(pairs: Sequence[TokenisedPair], indices: Sequence[int], side: str) -> list[int]:
    """Those of `indices` whose example has an answer on `side` (chosen, rejected)."""
    return [i for i in indices if getattr(pairs[i], side)]


def texts(pairs: Sequence[TokenisedPair], *, whole: bool = False) -> list[Said]:
    """The rows of a batch: all chosen answers, then all rejected ones; with `whole` the chosen prompts count too."""
    chosen = [Said(pair.prompt, pair.chosen, len(pair.prompt) - 1 if whole else 0) for pair in pairs if pair.chosen]
    return chosen + [Said(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]


class Batch(NamedTuple):
    """Examples laid out for the forward pass, with what they begin with above the lowest blocks."""

    pairs: Sequence[TokenisedPair]
    rows: Rows
    states: States


def batch_of(forward: Forward, pairs: Sequence[TokenisedPair], sums: Sums) -> Batch:
    """Lay examples out; what lies below the adapters is computed, or remembered, here."""
    rows = forward.rows_of(texts(pairs, whole=sums.whole))
    return Batch(pairs, rows, forward.states(rows))


def batch_scores(forward: Forward, batch: Batch, sums: Sums) -> Scores:
    """Score a batch within a gradient, differentiably in `logps`, `plain` and `whole`; nothing is computed yet."""
    numbers = forward.token_logps(batch.rows, batch.states, learning=True, squares=sums.confidence)
    return _summed(numbers, batch.rows, batch.pairs, sums)


def computed_scores(forward: Forward, pairs: Sequence[TokenisedPair], sums: Sums) -> Scores:
    """Score a batch without a gradient, computed."""
    batch = batch_of(forward, pairs, sums)
    with forward.at_work():
        numbers = forward.token_logps(batch.rows, batch.states, squares=sums.confidence)
        scores = _summed(numbers, batch.rows, pairs, sums)
        mx.eval(scores)
    mx.clear_cache()
    return scores


def _summed(numbers: mx.array, rows: Rows, pairs: Sequence[TokenisedPair], sums: Sums) -> Scores:
    """Sums over answers of (1 or 2, scored) numbers of tokens: log p, and log Σ p² for WPO."""
    logps, squares = numbers[0], numbers[-1]
    count = sum(bool(pair.chosen) for pair in pairs)
    place = rows.ordinals - _skipped(pairs, rows, sums.whole)
    answer = (place >= 0).astype(mx.float32)
    plain = row_sums(logps * answer, rows)
    weighed = plain
    if sums.ld_alpha is not None:
        tail = place >= _shared(pairs)[rows.row_of]
        weighed = row_sums(logps * answer * mx.where(tail, sums.ld_alpha, 1.0), rows)
    both = Answers(
        logps=weighed,
        plain=plain,
        whole=row_sums(logps, rows) if sums.whole else mx.zeros_like(plain),
        opening=mx.stop_gradient(row_sums(logps * (answer * (place < OPENING)), rows)),
        confidence=_confidence(logps - squares, answer, rows) if sums.confidence else mx.ones_like(plain),
    )
    return Scores(both.part(slice(0, count)), both.part(slice(count, None)))


def _skipped(pairs: Sequence[TokenisedPair], rows: Rows, whole: bool) -> mx.array:
    """Tokens of each row that come before its answer, for every token of the row."""
    counts = [len(pair.prompt) - 1 if whole else 0 for pair in pairs if pair.chosen]
    counts += [0 for pair in pairs if pair.rejected]
    return mx.array(counts, dtype=mx.int32)[rows.row_of]


def _shared(pairs: Sequence[TokenisedPair]) -> mx.array:
    """The length of each row's pair's shorter answer."""
    lengths = [min(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return mx.array(lengths + lengths, dtype=mx.int32)


def _confidence(aligned: mx.array, answer: mx.array, rows: Rows) -> mx.array:
    """WPO's weight of each answer: the geometric mean of p / Σp² over its tokens.

    Zhou et al. 2024, eq. 2 (arXiv:2406.11827), with the aligned weights of its section on weighting, as TRL 1.16.
    """
    return mx.stop_gradient(mx.exp(row_sums(aligned * answer, rows) / row_sums(answer, rows)))


def recalled_scores(forward: Forward, pairs: Sequence[TokenisedPair], sums: Sums, remembered: Remembered) -> Scores:
    """The same of a reference, whose log-probabilities may be known from before, and are from now on.

    A reference has no use for WPO's weights, and none are given.
    """
    said = texts(pairs, whole=sums.whole)
    known = list(remembered.recalled(said))
    missing = [text for text, values in zip(said, known, strict=True) if values is None]
    if missing:
        rows = forward.rows_of(missing)
        with forward.at_work():
            logps = np.array(forward.token_logps(rows)[0])
        mx.clear_cache()
        found = np.split(logps, np.cumsum([text.lead + len(text.answer) for text in missing])[:-1])
        remembered.remember(missing, found)
        new = iter(found)
        known = [next(new) if values is None else values for values in known]
    numbers = mx.array(np.concatenate([values for values in known if values is not None]))[None]
    scores = _summed(numbers, tokens_of(said), pairs, sums._replace(confidence=False))
    mx.eval(scores)
    return scores


def scored(
    forward: Forward,
    pairs: Sequence[TokenisedPair],
    batch_size: int,
    sums: Sums,
    at_once: float | None = None,
    remembered: Remembered | None = None,
    group: Group = _ALONE,
) -> Iterator[Progress | Scores]:
    """Score all examples, yielding progress after each batch and the Scores, as NumPy arrays, at the end.

    Each side has a place for every example; where an example has no such answer, it holds 0. `remembered` is given
    where the model is the reference; each rank of `group` computes a part, and all have all at the end.
    """
    found = empty_scores(len(pairs))
    lengths = [pair.longest for pair in pairs]
    done = 0
    batches = by_length(lengths, batch_size, at_once)
    for batch in group.share(batches, [float(sum(lengths[i] for i in some)) for some in batches]):
        some = [pairs[i] for i in batch]
        if remembered is None:
            put(found, computed_scores(forward, some, sums), pairs, batch)
        else:
            put(found, recalled_scores(forward, some, sums, remembered), pairs, batch)
        done += len(batch)
        yield Progress(done, len(pairs))
    yield together(group, {}, 0.0, found)[2]


def empty_scores(count: int) -> Scores:
    """Places for the numbers of `count` examples."""
    return Scores(*(Answers(*(np.zeros(count, dtype=np.float32) for _ in Answers._fields)) for _ in Scores._fields))


def put(found: Scores, scores: Scores, pairs: Sequence[TokenisedPair], indices: Sequence[int]) -> None:
    """Write a batch's numbers to the places of its examples."""
    for side in Scores._fields:
        places = having(pairs, indices, side)
        for into, values in zip(getattr(found, side), getattr(scores, side), strict=True):
            into[places] = np.array(values)


def together(group: Group, gradients: Any, loss: float, found: Scores) -> tuple[Any, float, Scores]:
    """Gradients, loss and numbers of examples from all ranks, each of which holds zeros where it computed nothing."""
    if group.size == 1:
        return gradients, loss, found
    numbers = [[mx.array(values) for values in side] for side in found]
    gradients, total, numbers = group.summed([gradients, mx.array(loss, dtype=mx.float32), numbers])
    return gradients, float(total), Scores(*(Answers(*map(np.array, side)) for side in numbers))


def present(scores: Scores, pairs: Sequence[TokenisedPair], indices: Sequence[int]) -> Scores:
    """The numbers of the answers that the examples `indices` have, side by side as a batch has them.

    `scores` has a place for every example of `pairs`.
    """
    return Scores(*(getattr(scores, side).part(having(pairs, indices, side)) for side in Scores._fields))


def mismatched(pairs: Sequence[TokenisedPair], block: int) -> list[TokenisedPair]:
    """Each example's prompt with the answer before it, cyclically within blocks of `block` examples in data order.

    KTO estimates the policy's divergence from these, the pairing being that of TRL 1.16, but that a last example which
    would be a block by itself joins the one before, lest it meet its own answer; a single example in all does meet it.
    Nothing is cut: a long prompt with a long answer may have more tokens than any example.
    """
    made = []
    for start, end in _blocks(len(pairs), block):
        group = pairs[start:end]
        made += [
            TokenisedPair(pair.prompt, group[place - 1].chosen or group[place - 1].rejected, [], pair.source)
            for place, pair in enumerate(group)
        ]
    return made


def _blocks(count: int, block: int) -> list[tuple[int, int]]:
    """Start and end of each block of `block` examples, a lone last one taken into the block before it."""
    starts = list(range(0, count, block))
    if count > block and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))
