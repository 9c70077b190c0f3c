"""Rows: every scored token once, where its output stands, however the texts are dealt out; and little padding."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from mlx_dpo.models.rows import WASTE, Rows, Said, grouped, rows_of


class Place(NamedTuple):
    """A place in the outputs of a pass: the tokens that it has seen, itself last, and whether it is padding."""

    seen: tuple[int, ...]
    block: int


def places(rows: Rows) -> list[Place]:
    """What every place has seen, block by block, read from the tokens alone."""
    found: list[Place] = []
    for number, block in enumerate(rows.blocks):
        prompts: list[tuple[int, ...]] = []
        if block.prompts is not None and block.lengths is not None:
            for row, length in zip(np.array(block.prompts).tolist(), np.array(block.lengths).tolist(), strict=True):
                prompts.append(tuple(row[:length]))
                found += [Place(tuple(row[: at + 1]), number) for at in range(len(row))]
        for piece in block.pieces:
            tokens = np.array(piece.tokens).tolist()
            of = [None] * len(tokens) if piece.prompt_of is None else np.array(piece.prompt_of).tolist()
            for row, prompt in zip(tokens, of, strict=True):
                before = () if prompt is None else prompts[prompt]
                found += [Place((*before, *row[: at + 1]), number) for at in range(len(row))]
    return found


def assert_laid_out(said: list[Said], rows: Rows) -> None:
    """Each scored token has its target, row and number, and its place has seen just what stands before it."""
    seen = places(rows)
    assert sum(block.computed for block in rows.blocks) == len(seen)
    at, targets, row_of, ordinals = (
        np.array(part).tolist() for part in (rows.places, rows.targets, rows.row_of, rows.ordinals)
    )
    expected = []
    for number, text in enumerate(said):
        whole, first = [*text.prompt, *text.answer], len(text.prompt) - text.lead
        expected += [(number, i - first, whole[i], tuple(whole[:i])) for i in range(first, len(whole))]
    given = [
        (row, ordinal, target, seen[place].seen)
        for row, ordinal, target, place in zip(row_of, ordinals, targets, at, strict=True)
    ]
    assert given == expected


def drawn(seed: int) -> list[Said]:
    """Texts of random lengths, several to a prompt, some of one token, in no order."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(1, 99, random.integers(1, 14)).tolist() for _ in range(random.integers(1, 5))]
    texts = []
    for _ in range(random.integers(1, 9)):
        prompt = prompts[random.integers(len(prompts))]
        answer = random.integers(1, 99, random.choice([1, 1, 2, 3, 20])).tolist()
        texts.append(Said(prompt, answer, int(random.integers(len(prompt)))))
    return texts


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_every_scored_token_is_there_once_and_its_place_has_seen_what_comes_before_it(shared: bool, lanes: int):
    for seed in range(60):
        texts = drawn(seed)
        rows = rows_of(texts, shared=shared, lanes=lanes)
        assert_laid_out(texts, rows)
        prompts = {tuple(text.prompt) for text in texts}
        assert 1 <= len(rows.blocks) <= lanes
        assert len(rows.blocks) == min(lanes, len(prompts) if shared else len(texts))
        once = sum(map(len, prompts)) if shared else sum(len(text.prompt) for text in texts)
        assert rows.tokens == once + sum(len(text.answer) - 1 for text in texts)


def test_a_prompt_is_computed_once_in_one_block_alone():
    for seed in range(60):
        blocks = rows_of(drawn(seed), shared=True, lanes=3).blocks
        prompts = [
            tuple(row[:length])
            for block in blocks
            if block.prompts is not None and block.lengths is not None
            for row, length in zip(np.array(block.prompts).tolist(), np.array(block.lengths).tolist(), strict=True)
        ]
        assert sorted(prompts) == sorted({tuple(text.prompt) for text in drawn(seed)})


def test_a_text_is_the_pair_of_its_prompt_and_its_answer():
    pairs = [([1, 2], [3, 4]), ([1, 2], [5]), ([6], [7, 8, 9])]
    for shared in (False, True):
        assert_laid_out([Said(*pair) for pair in pairs], rows_of(pairs, shared=shared))


def padded(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[i] for i in group) for group in groups)


def least_padded(lengths: list[int], count: int) -> int:
    """By brute force over all partitions into so many groups."""
    splits = itertools.product(range(count), repeat=len(lengths))
    return min(
        padded(lengths, [[i for i, part in enumerate(split) if part == group] for group in range(count)])
        for split in splits
        if set(split) == set(range(count))
    )


def test_groups_are_of_like_length_the_longest_first_and_waste_little():
    random = np.random.default_rng(1)
    for _ in range(200):
        lengths = random.integers(1, 400, random.integers(1, 40)).tolist()
        groups = grouped(lengths)
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
        flat = [lengths[i] for group in groups for i in group]
        assert flat == sorted(lengths, reverse=True)
        alone = all(len({lengths[i] for i in group}) == 1 for group in groups)
        assert alone or padded(lengths, groups) <= (1 + WASTE) * sum(lengths)


def test_groups_are_the_fewest_and_the_best_of_their_number():
    random = np.random.default_rng(2)
    for _ in range(40):
        lengths = random.integers(1, 60, random.integers(1, 7)).tolist()
        groups = grouped(lengths)
        assert padded(lengths, groups) == least_padded(lengths, len(groups))
        if len(groups) > 1:
            assert least_padded(lengths, len(groups) - 1) > (1 + WASTE) * sum(lengths)


def test_no_lengths_are_no_groups():
    assert grouped([]) == []
    assert grouped([5, 5, 5]) == [[0, 1, 2]]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pairs", [4, 16])
def test_usual_pairs_waste_less_than_a_twentieth(pairs: int, shared: bool, lanes: int):
    random = np.random.default_rng(pairs)
    wastes = []
    for _ in range(50):
        texts = []
        for number in range(pairs):
            prompt, chosen, rejected = np.maximum(random.normal([42, 150, 200], [4, 40, 40]), 2).astype(int)
            texts += [Said([number + 1] * prompt, [1] * chosen), Said([number + 1] * prompt, [2] * rejected)]
        wastes.append(rows_of(texts, shared=shared, lanes=lanes).waste)
    assert np.mean(wastes) < 0.05
