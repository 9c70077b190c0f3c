"""A loss as it is asked for: one objective by name, or a weighted sum of several."""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.align import objectives
from mlx_dpo.align.objectives import COUPLED, PER_TOKEN, TERMS, Objective
from mlx_dpo.align.quantities import NAMES, OF_DIVERGENCE, OF_MEANS, OF_REFERENCE, Quantities
from mlx_dpo.refusal import Refusal

_TERM = re.compile(r"(?:(?P<weight>[0-9.eE+-]*[0-9.])\s*\*\s*)?(?P<name>[a-z_]+)")
_PLUS = re.compile(r"(?<![0-9.][eE])\+")  # not that of an exponent


class Term(NamedTuple):
    """An objective with its weight in the sum."""

    weight: float
    objective: Objective


class Total(NamedTuple):
    """What a batch adds to the loss, answer by answer: losses that count by example, by token and by token of all.

    by_example: (examples,); by_token, by_whole_token: (chosen answers,). Where there is no such term, zeros of ().
    """

    by_example: mx.array
    by_token: mx.array
    by_whole_token: mx.array


class Mixture(NamedTuple):
    """The terms of a loss, and what they need."""

    terms: tuple[Term, ...]

    @property
    def quantities(self) -> frozenset[str]:
        """Everything that the terms take of `Quantities`."""
        return frozenset(name for term in self.terms for name in parameters(term.objective) if name in NAMES)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the terms use, with their defaults; where two differ, the first term's."""
        found: dict[str, Any] = {}
        for term in reversed(self.terms):
            found |= {n: p.default for n, p in parameters(term.objective).items() if n not in NAMES}
        return found

    @property
    def needs_reference(self) -> bool:
        """Whether any term compares with the reference."""
        return bool(self.quantities & OF_REFERENCE)

    @property
    def takes_means(self) -> bool:
        """Whether any term sees answers by their mean log p per token, as which they are then logged."""
        return bool(self.quantities & OF_MEANS)

    @property
    def is_unpaired(self) -> bool:
        """Whether it learns from single answers, thumbs up or down."""
        return any(term.objective is objectives.kto for term in self.terms)

    @property
    def is_coupled(self) -> bool:
        """Whether a pair's loss has a gradient in the other pairs of its step."""
        return any(term.objective in COUPLED for term in self.terms)

    @property
    def takes_divergences(self) -> bool:
        """Whether every preference term sees log-ratios only as a difference of scores, so that β·log Z cancels."""
        return all(self._quantities_of(term) <= OF_DIVERGENCE for term in self.preference)

    @property
    def preference(self) -> tuple[Term, ...]:
        """The terms that are not a likelihood."""
        return tuple(term for term in self.terms if term.objective not in PER_TOKEN)

    @property
    def likelihood_weight(self) -> float:
        """The weight of the chosen answers' likelihood, 0 without that term."""
        return sum(term.weight for term in self.terms if term.objective is objectives.likelihood)

    def with_likelihood(self, weight: float) -> "Mixture":
        """The same with the chosen answers' likelihood at another weight; 0 takes the term away."""
        others = tuple(term for term in self.terms if term.objective is not objectives.likelihood)
        return Mixture(others + ((Term(weight, objectives.likelihood),) if weight else ()))

    def total(self, found: Quantities, options: Mapping[str, Any], confidence: mx.array | None = None) -> Total:
        """Add the terms up; preference terms are multiplied by `confidence`, (pairs,), where it is given."""
        sums = [mx.array(0.0), mx.array(0.0), mx.array(0.0)]
        for weight, objective in self.terms:
            losses = weight * objective(**self._arguments(objective, found, options))
            if confidence is not None and objective not in PER_TOKEN:
                losses = losses * confidence
            place = PER_TOKEN.index(objective) + 1 if objective in PER_TOKEN else 0
            sums[place] = sums[place] + losses
        return Total(*sums)

    def _arguments(self, objective: Objective, found: Quantities, options: Mapping[str, Any]) -> dict[str, Any]:
        return {n: getattr(found, n) if n in NAMES else options[n] for n in parameters(objective)}

    def _quantities_of(self, term: Term) -> set[str]:
        return {name for name in parameters(term.objective) if name in NAMES}


@cache
def parameters(objective: Objective) -> Mapping[str, inspect.Parameter]:
    """What an objective takes, by name."""
    return inspect.signature(objective).parameters


def mixture(text: str, sft_weight: float | None = None) -> Mixture:
    """The loss that a text such as `sigmoid` or `0.8*sigmoid+0.2*bco_pair+sft` asks for.

    `sft_weight`, where given, replaces the weight of the likelihood term. Raises Refusal for a name that is not known
    and for a mix that makes no sense.
    """
    made: list[Term] = []
    for part in _PLUS.split(text.replace(" ", "")):
        found = _TERM.fullmatch(part)
        if found is None or found["name"] not in TERMS:
            raise Refusal(f"--loss {text} is not known: give one of {', '.join(TERMS)}, or a sum like sigmoid+0.5*sft.")
        made += [Term(_weight(text, found["weight"]), objective) for objective in TERMS[found["name"]]]
    result = Mixture(_merged(made))
    return result if sft_weight is None else result.with_likelihood(sft_weight)


def option_names() -> frozenset[str]:
    """Every option that some objective uses."""
    every = (objective for group in TERMS.values() for objective in group)
    return frozenset(name for objective in every for name in parameters(objective) if name not in NAMES)


def _weight(text: str, given: str | None) -> float:
    try:
        weight = float(given) if given else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1e3:
        raise Refusal(f"--loss {text} has the weight {given}: give one of more than 0 and at most 1000.")
    return weight


def _merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    weights: dict[Objective, float] = {}
    for weight, objective in terms:
        weights[objective] = weights.get(objective, 0.0) + weight
    if objectives.kto in weights and set(weights) - {objectives.kto, objectives.likelihood}:
        raise Refusal("--loss kto learns from single answers and can be mixed with sft only.")
    return tuple(Term(weight, objective) for objective, weight in weights.items())
