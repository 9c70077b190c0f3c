"""The floating-point operations that a DPO step needs at least, for the share of the matrix-product limit."""

from collections.abc import Sequence
from typing import Any

from benchmarks.pairs import Lengths


def least_operations(config: dict[str, Any], pairs: Sequence[Lengths], layers: int | None) -> float:
    """Additions and multiplications of one step a pair, each prompt computed once, adapters on `layers` top blocks.

    Counted are the frozen linear layers' and the head's products and attention's, forward and for the gradient by
    their input, where there is an adapter below that needs it. Not counted are the adapters' own products, norms,
    softmax, and all that a program recomputes. The top block's keys and values are needed at every place, all else in
    it only where an answer's token is predicted.
    """
    return sum(_pair(config, pair, layers) for pair in pairs)


def _pair(config: dict[str, Any], pair: Lengths, layers: int | None) -> float:
    blocks = config["num_hidden_layers"]
    adapted = blocks if layers is None else layers
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    keys = 2 * hidden * width * config["num_key_value_heads"]
    queries = hidden * width * heads
    rest = queries + 3 * hidden * config["intermediate_size"]
    # The last token of an answer predicts nothing, and both answers' first token is predicted at the same place.
    places = pair.prompt + pair.chosen + pair.rejected - 2
    predicting = places - (pair.prompt - 1)
    block = 2.0 * (keys + queries + rest) * places
    top = 2.0 * (keys * places + (queries + rest) * predicting)
    head = 2.0 * hidden * config["vocab_size"] * predicting
    linear = (blocks - 1) * block + top + head
    # Nothing below the lowest adapted block's queries, keys and values learns, so they pass no gradient on.
    lowest = 2.0 * (keys + queries) * places
    backward = (adapted - 1) * block + top + head - lowest
    seen, seen_at_top = _seen(pair)
    product = 4.0 * width * heads  # of queries with keys, and of weights with values
    attention = product * ((blocks - 1) * seen + seen_at_top)
    attention_backward = 2 * product * ((adapted - 1) * seen + seen_at_top)
    return linear + backward + attention + attention_backward


def _seen(pair: Lengths) -> tuple[float, float]:
    """How many places are looked at, over all places of a pair and over those that predict an answer's token."""
    prompt = pair.prompt * (pair.prompt + 1) / 2
    answers = sum(places * pair.prompt + places * (places + 1) / 2 for places in (pair.chosen - 1, pair.rejected - 1))
    return prompt + answers, pair.prompt + answers
