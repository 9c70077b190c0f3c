"""What a measure says of answers that are none: whoever does not beat these has shown nothing."""

from collections.abc import Sequence

import numpy as np

from mlx_dpo.data.asked import Asked
from mlx_dpo.data.audit.copies import Encode, closest, unit
from mlx_dpo.data.examples import Example

ECHO, CONSTANT, NEAREST = "the question itself", "one answer to all", "the nearest answer learnt"


def floors(asked: Sequence[Asked], learnt: Sequence[Example], encode: Encode | None) -> dict[str, list[str]]:
    """The question echoed, one reference given to every question, and the answer of the nearest question learnt.

    The one reference is that which is most like all others in meaning, or in length without an encoder.
    """
    found = {ECHO: [question.question for question in asked]}
    references = [question.reference for question in asked if question.reference is not None]
    if references:
        found[CONSTANT] = [references[_middle(references, encode)]] * len(asked)
    pairs = [pair for pair in learnt if pair.chosen]
    if pairs and encode is not None:
        _, nearest = closest(_questions(asked, encode), unit(encode([pair.prompt[-1]["content"] for pair in pairs])))
        found[NEAREST] = [pairs[i].chosen or "" for i in nearest]
    return found


def nearness(asked: Sequence[Asked], learnt: Sequence[Example], encode: Encode | None) -> np.ndarray | None:
    """Each question's highest cosine with a prompt that was learnt, (questions,); None where it cannot be told."""
    prompts = [pair.prompt[-1]["content"] for pair in learnt if pair.prompt]
    if not prompts or encode is None:
        return None
    return closest(_questions(asked, encode), unit(encode(prompts)))[0]


def _questions(asked: Sequence[Asked], encode: Encode) -> np.ndarray:
    return unit(encode([question.question for question in asked]))


def _middle(texts: Sequence[str], encode: Encode | None) -> int:
    if encode is None:
        lengths = [len(text) for text in texts]
        return int(np.argsort(lengths)[len(lengths) // 2])
    vectors = unit(encode(texts))
    return int((vectors @ vectors.mean(axis=0)).argmax())
