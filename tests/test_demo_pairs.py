"""The demo's pairs: well formed, safe, and without a shortcut that tells chosen from rejected."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import mlx_dpo.demo

FOLDER = Path(mlx_dpo.demo.__file__).parent
FOLDS = 7
SHUFFLES = 5
SHORTCUT = 0.70
WORDS = (40, 75)
FIRST_PERSON = {"i", "i'm", "i've", "i'll", "i'd", "me", "my", "myself", "mine", "we", "we're", "we've", "us", "our"}
INSULTS = {
    "stupid", "idiot", "idiotic", "lazy", "crazy", "selfish", "pathetic", "foolish", "fool", "weak-minded",
    "ridiculous", "dumb", "senile", "useless", "hopeless", "bad daughter", "bad son", "whining", "whine",
    "ungrateful", "hysterical", "shame on", "shut up", "moron", "disgusting", "your own fault",
}  # fmt: skip
CLAIMS = [
    r"\bas an? (doctor|nurse|physician|therapist|counselor|social worker|attorney|lawyer|pharmacist)\b",
    r"\bI(?:'m| am) an? ",
    r"\bI (?:once|also) ",
    r"\bI(?:'ve| have) (?:been|seen|cared|lost|had)\b",
    r"\bmy (?:own )?(?:patients?|clients?|practice|mother|father|experience|training)\b",
    r"\bI (?:totally|completely|fully)? ?understand\b",
    r"\bI know (?:exactly )?how you feel\b",
]
DOSE = re.compile(
    r"\b(?:\d+(?:\.\d+)?|one|two|three|four|five|six|half|a half)[ -]?"
    r"(?:mg|mcg|µg|g|grams?|milligrams?|ml|cc|milliliters?|tablets?|pills?|capsules?|drops|units|tsp|teaspoons?"
    r"|tablespoons?|times (?:a|per) day|doses?)\b",
    re.IGNORECASE,
)
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


TRAIN, VALID, QUESTIONS = rows("train"), rows("valid"), rows("questions")
PAIRS = TRAIN + VALID
ANSWERS = [(row[kind], kind) for row in PAIRS for kind in ("chosen", "rejected")]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+[\"')]*(?=\s|$)", text))


def syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end; at least one."""
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = word.endswith("e") and not word.endswith(("le", "ee", "ye")) or word.endswith(("ed", "es"))
    return max(1, groups - bool(silent and groups > 1 and not re.search(r"(?:[td]ed|[sxz]es|[cg]es|hes)$", word)))


def words_per_sentence(text: str) -> float:
    return len(words(text)) / sentences(text)


def syllables_per_word(text: str) -> float:
    return sum(map(syllables, words(text))) / len(words(text))


def grade(text: str) -> float:
    """Flesch-Kincaid grade (Kincaid et al. 1975)."""
    return 0.39 * words_per_sentence(text) + 11.8 * syllables_per_word(text) - 15.59


MEASURES: dict[str, Callable[[str], float]] = {
    "words": lambda text: len(words(text)),
    "characters": len,
    "grade": grade,
    "words per sentence": words_per_sentence,
    "syllables per word": syllables_per_word,
}


def folds(pairs: int, seed: int) -> list[np.ndarray]:
    """Pairs dealt to folds at random; both answers of a pair fall into the same one."""
    return np.array_split(np.random.default_rng(seed).permutation(pairs), FOLDS)


def cross_validated(score: Callable[[np.ndarray, np.ndarray], np.ndarray], pairs: int) -> float:
    """Share of held-out answers told right, over all folds and shuffles; an undecided one counts half.

    `score(train, held)` returns, for the pairs `held` and a rule learnt on the pairs `train`, an array of
    shape (held, 2): above 0 says "chosen", below 0 "rejected", for the chosen and the rejected answer.
    """
    shares = []
    for seed in range(SHUFFLES):
        parts = folds(pairs, seed)
        for index, held in enumerate(parts):
            train = np.concatenate([part for other, part in enumerate(parts) if other != index])
            right = np.sign(score(train, held)) * np.array([1, -1])
            shares.append((right.mean() + 1) / 2 * len(held) / pairs)
    return sum(shares) / SHUFFLES


def opening_accuracy(pairs: Sequence[Row], length: int) -> float:
    """Naive Bayes with Laplace smoothing over the first `length` words, each at its own place."""
    openings = [[tuple(enumerate(words(row[kind])[:length])) for kind in ("chosen", "rejected")] for row in pairs]

    def score(train: np.ndarray, held: np.ndarray) -> np.ndarray:
        counts = [Counter(place for pair in train for place in openings[pair][kind]) for kind in (0, 1)]
        return np.array(
            [
                [
                    sum(math.log((counts[0][p] + 1) / (counts[1][p] + 1)) for p in openings[pair][kind])
                    for kind in (0, 1)
                ]
                for pair in held
            ]
        ).round(9)

    return cross_validated(score, len(pairs))


def best_threshold(values: np.ndarray) -> tuple[float, int]:
    """The cut, and the side of the chosen answers, that tell most of `values` (pairs, 2) right."""
    cuts = np.concatenate([[-np.inf], np.unique(values)])
    right = (values[:, 0] > cuts[:, None]).mean(1) + (values[:, 1] <= cuts[:, None]).mean(1)
    high, low = int(right.argmax()), int(right.argmin())
    return (cuts[high], 1) if right[high] >= 2 - right[low] else (cuts[low], -1)


def threshold_accuracy(pairs: Sequence[Row], measure: Callable[[str], float]) -> float:
    """One cut through `measure`, learnt with its direction on the training folds."""
    values = np.array([[measure(row["chosen"]), measure(row["rejected"])] for row in pairs], dtype=float)

    def score(train: np.ndarray, held: np.ndarray) -> np.ndarray:
        cut, side = best_threshold(values[train])
        return np.where(values[held] > cut, side, -side)

    return cross_validated(score, len(pairs))


def pairwise_share(pairs: Sequence[Row], measure: Callable[[str], float]) -> float:
    """Share of pairs on the larger side when the answers of a pair are compared; equal ones count half."""
    signs = np.sign([measure(row["chosen"]) - measure(row["rejected"]) for row in pairs])
    return float(0.5 + abs(signs.mean()) / 2)


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the two sets of words."""
    left, right = set(words(one)), set(words(other))
    return len(left & right) / len(left | right)


# --- the files -------------------------------------------------------------------------------------------------


def test_sizes():
    assert (len(TRAIN), len(VALID), len(QUESTIONS)) == (64, 20, 6)


def test_rows_hold_plain_strings_without_stray_blanks():
    for row in PAIRS:
        assert set(row) == {"prompt", "chosen", "rejected"}
    assert all(set(row) == {"prompt"} for row in QUESTIONS)
    texts = [text for row in PAIRS + QUESTIONS for text in row.values()]
    assert [text for text in texts if not isinstance(text, str) or text != " ".join(text.split())] == []


def test_every_text_occurs_once():
    texts = Counter(text.lower() for row in PAIRS + QUESTIONS for text in row.values())
    assert [text for text, count in texts.items() if count > 1] == []


def test_no_two_prompts_are_nearly_the_same():
    prompts = [row["prompt"] for row in PAIRS + QUESTIONS]
    assert [pair for pair in combinations(prompts, 2) if similarity(*pair) >= 0.5] == []


def test_no_two_answers_are_nearly_the_same():
    assert [pair for pair in combinations([text for text, _ in ANSWERS], 2) if similarity(*pair) >= 0.5] == []


# --- the prompts -----------------------------------------------------------------------------------------------


def test_prompts_are_mostly_in_the_first_person():
    spoken = [bool(FIRST_PERSON & set(words(row["prompt"]))) for row in PAIRS + QUESTIONS]
    assert np.mean(spoken) >= 0.9


def test_prompts_are_of_many_lengths():
    lengths = [len(row["prompt"].split()) for row in PAIRS + QUESTIONS]
    assert min(lengths) >= 10
    assert max(lengths) <= 60
    assert np.std(lengths) >= 6


# --- the answers -----------------------------------------------------------------------------------------------


def test_answers_keep_to_the_limits_and_end_as_sentences():
    wrong = [text for text, _ in ANSWERS if not WORDS[0] <= len(text.split()) <= WORDS[1] or text[-1] not in ".?"]
    assert wrong == []


def test_answers_of_a_pair_open_with_different_words():
    assert [row for row in PAIRS if words(row["chosen"])[0] == words(row["rejected"])[0]] == []


def test_no_opening_word_is_common_to_many_answers():
    for kind in ("chosen", "rejected"):
        (_, count), *_ = Counter(words(row[kind])[0] for row in PAIRS).most_common(1)
        assert count <= 0.1 * len(PAIRS)


def test_rejected_answers_do_not_insult():
    insult = re.compile(r"\b(?:" + "|".join(map(re.escape, INSULTS)) + r")\b", re.IGNORECASE)
    assert [row["rejected"] for row in PAIRS if insult.search(row["rejected"])] == []


def test_no_answer_names_a_dose():
    assert [text for text, _ in ANSWERS if DOSE.search(text)] == []


def test_no_answer_tells_to_stop_or_change_a_medicine():
    order = re.compile(
        r"\b(?:stop|quit|skip|halve|double|increase|reduce|lower|start) (?:giving )?"
        r"(?:his|her|their|the|any|that|this) (?:\w+ )?(?:medicines?|medications?|pills?|drugs?|doses?|tablets?)\b",
        re.IGNORECASE,
    )
    assert [text for text, _ in ANSWERS if order.search(text)] == []


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_answer_claims_a_licence_or_a_life(claim: str):
    pattern = re.compile(claim, re.IGNORECASE)
    said = [(text, re.sub(r'"[^"]*"', "", text)) for text, _ in ANSWERS]
    assert [text for text, own in said if pattern.search(own)] == []


# --- no shortcut from form to preference -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_opening_words_do_not_tell_chosen_from_rejected(length: int):
    assert opening_accuracy(PAIRS, length) < SHORTCUT


@pytest.mark.parametrize("name", MEASURES)
def test_no_threshold_tells_chosen_from_rejected(name: str):
    assert threshold_accuracy(PAIRS, MEASURES[name]) < SHORTCUT


@pytest.mark.parametrize("name", MEASURES)
def test_neither_answer_of_a_pair_usually_measures_more(name: str):
    assert pairwise_share(PAIRS, MEASURES[name]) < SHORTCUT


# --- the instruments themselves --------------------------------------------------------------------------------


def test_the_classifiers_find_a_shortcut_where_there_is_one():
    marked = [row | {"rejected": "Caregivers must know: " + row["rejected"] + " " + row["rejected"]} for row in PAIRS]
    assert opening_accuracy(marked, 1) > 0.75
    assert threshold_accuracy(marked, MEASURES["words"]) > 0.95
    assert pairwise_share(marked, MEASURES["characters"]) > 0.95
    long = [row | {"chosen": row["chosen"].replace(".", ",").rstrip(",") + "."} for row in PAIRS]
    assert threshold_accuracy(long, MEASURES["grade"]) > 0.9


def test_a_threshold_on_a_coin_is_right_half_the_time():
    coin = np.random.default_rng(0).random((20_000, 2))
    cut, side = best_threshold(coin[:10_000])
    right = (coin[10_000:] > cut) == (np.array([1, -1]) == side)
    assert right.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("word", "count"),
    [("tea", 1), ("table", 2), ("washed", 1), ("wanted", 2), ("changes", 2), ("medicine", 3), ("free", 1), ("eyes", 1)],
)
def test_syllables_of_known_words(word: str, count: int):
    assert syllables(word) == count


def test_grade_of_a_known_sentence():
    # 6 words, 1 sentence, 6 syllables: 0.39 * 6 + 11.8 - 15.59
    assert grade("The cat sat on the mat.") == pytest.approx(-1.45)
