"""How much of a reference an answer says in the same words and letters."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlx_dpo.prose import words

_ORDERS = 6  # of characters
_RECALL_WEIGHT = 2.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of lower-case words, from 0 to 1.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    ours, theirs = words(answer.lower()), words(reference.lower())
    if not ours or not theirs:
        return 0.0
    common = _longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    ids = {word: number for number, word in enumerate({*ours, *theirs})}
    row, other = np.zeros(len(theirs) + 1, dtype=int), np.array([ids[word] for word in theirs])
    for word in ours:
        reached = np.maximum(row[1:], row[:-1] + (other == ids[word]))
        row[1:] = np.maximum.accumulate(reached)
    return int(row[-1])


def chrf(answer: str, reference: str) -> float:
    """chrF2: F-score of character 1- to 6-grams without spaces, recall weighing twice, from 0 to 1.

    Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation"; orders that neither text has are left
    out, as in sacrebleu.
    """
    ours, theirs = ("".join(text.split()) for text in (answer, reference))
    precisions, recalls = [], []
    for order in range(1, _ORDERS + 1):
        mine, yours = _grams(ours, order), _grams(theirs, order)
        if mine and yours:
            common = sum((mine & yours).values())
            precisions.append(common / sum(mine.values()))
            recalls.append(common / sum(yours.values()))
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = float(np.mean(precisions)), float(np.mean(recalls))
    weight = _RECALL_WEIGHT**2
    return (1 + weight) * precision * recall / (weight * precision + recall)


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
