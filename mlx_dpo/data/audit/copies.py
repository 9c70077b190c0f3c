"""Prompts that are there twice, in the same words or in others, and questions of a test that are among them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_dpo.data.audit.findings import SHOWN, Finding, Shown, Subject, level
from mlx_dpo.prose import plain, words

NEAR = 0.85  # cosine of two prompts that ask nearly the same
_SAME_WORDS = 0.8  # of all their words, shared by two prompts
_COPIES, _NEAR, _LEAKED = 0.01, 0.05, 0.0
_AT_ONCE = 1024

Encode = Callable[[Sequence[str]], np.ndarray]


def same(text: str) -> str:
    """What is left of a text when case, punctuation and spaces are passed over."""
    return " ".join(words(plain(text)))


def duplicates(subject: Subject) -> Iterator[Finding]:
    """Prompts and answers that are there more than once, letter case and punctuation apart."""
    for name, texts in (("prompts", subject.prompts), ("chosen answers", subject.chosen)):
        keys = [same(text) for text in texts]
        count = Counter(keys)
        again = [i for i, key in enumerate(keys) if count[key] > 1]
        share = 1 - len(count) / len(keys)
        sentence = f"{len(count)} of {len(keys)} {name} are there only once or are the first of equals."
        numbers = {"rows": float(len(keys)), "unique": float(len(count)), "repeated": share}
        shown = subject.shown(sorted(again, key=lambda i: (keys[i], i)), texts)
        yield Finding(f"duplicates: {name}", level(share, _COPIES), sentence, numbers, shown)


def near_duplicates(subject: Subject, encode: Encode) -> Finding:
    """Prompts that mean nearly the same as another one, by the cosine of a sentence encoder."""
    vectors = unit(encode(subject.prompts))
    nearest, of = closest(vectors, vectors, apart=True)
    keys = [same(prompt) for prompt in subject.prompts]
    rows = [i for i in np.argsort(-nearest) if nearest[i] >= NEAR and keys[i] != keys[of[i]]]
    share = len(rows) / len(keys)
    shown = tuple(
        Shown(subject.sources[i], f"{nearest[i]:.2f}: {subject.prompts[i]} | {subject.prompts[of[i]]}")
        for i in rows[::2][:SHOWN]
    )
    sentence = f"{share:.0%} of the prompts mean nearly what another one does (cosine {NEAR} or more)."
    return Finding("near-duplicates", level(share, _NEAR), sentence, {"share": share}, shown)


def contamination(subject: Subject, questions: Sequence[str], encode: Encode | None) -> Iterator[Finding]:
    """Questions of a test that are among the prompts, in the same words, and nearly so where there is an encoder."""
    known = {same(prompt): source for prompt, source in zip(subject.prompts, subject.sources, strict=True)}
    found = [question for question in questions if same(question) in known]
    share = len(found) / len(questions)
    shown = tuple(Shown(known[same(question)], question) for question in found[:SHOWN])
    sentence = f"{share:.1%} of the test's questions are among the prompts."
    yield Finding("contamination: same words", level(share, _LEAKED), sentence, {"share": share}, shown)
    if encode is None:
        return
    nearest, of = closest(unit(encode(questions)), unit(encode(subject.prompts)))
    rows = [i for i in np.argsort(-nearest) if nearest[i] >= NEAR]
    share = len(rows) / len(questions)
    shown = tuple(
        Shown(subject.sources[of[i]], f"{nearest[i]:.2f}: {questions[i]} | {subject.prompts[of[i]]}")
        for i in rows[:SHOWN]
    )
    sentence = f"{share:.0%} of the test's questions have a prompt that means nearly the same (cosine {NEAR} or more)."
    yield Finding("contamination: near", level(share, _NEAR), sentence, {"share": share}, shown)


def groups(prompts: Sequence[str], encode: Encode | None) -> list[int]:
    """The group of each prompt: near-duplicates of one another, directly or through others, are of one group.

    Near are the same words, four in five of the same words, and, with an encoder, a cosine of NEAR.
    """
    keys = [same(prompt) for prompt in prompts]
    parent = list(range(len(prompts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in [*_alike_in_words(keys), *(_alike_in_meaning(prompts, encode) if encode else ())]:
        parent[max(root(i), root(j))] = min(root(i), root(j))
    return [root(i) for i in range(len(prompts))]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, so that their products are cosines."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def closest(ones: np.ndarray, others: np.ndarray, *, apart: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each of `ones` its highest cosine among `others` and whose it is; with `apart` its own place is left out."""
    best, whose = [], []
    for first in range(0, len(ones), _AT_ONCE):
        cosines = ones[first : first + _AT_ONCE] @ others.T
        if apart:
            cosines[np.arange(len(cosines)), np.arange(first, first + len(cosines))] = -1.0
        whose.append(cosines.argmax(axis=1))
        best.append(cosines[np.arange(len(cosines)), whose[-1]])
    return np.concatenate(best), np.concatenate(whose)


def _alike_in_words(keys: list[str]) -> Iterator[tuple[int, int]]:
    sets = [frozenset(key.split()) for key in keys]
    rare: defaultdict[str, list[int]] = defaultdict(list)
    often = Counter(word for words_of_it in sets for word in words_of_it)
    for i, words_of_it in enumerate(sets):
        # Two prompts that share four in five words share one of the rarest fifth of either, so only those are compared.
        few = sorted(words_of_it, key=lambda word: (often[word], word))[: len(words_of_it) // 5 + 1]
        for j in {j for word in few for j in rare[word]}:
            if len(sets[i] & sets[j]) >= _SAME_WORDS * len(sets[i] | sets[j]):
                yield j, i
        for word in few:
            rare[word].append(i)


def _alike_in_meaning(prompts: Sequence[str], encode: Encode) -> Iterator[tuple[int, int]]:
    vectors = unit(encode(prompts))
    for first in range(0, len(vectors), _AT_ONCE):
        rows, columns = np.nonzero(vectors[first : first + _AT_ONCE] @ vectors.T >= NEAR)
        yield from ((int(i) + first, int(j)) for i, j in zip(rows, columns, strict=True) if i + first < j)
