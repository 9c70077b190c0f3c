"""Going back to the last healthy checkpoint with a gentler loss or rate, and remembering that it was done."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from mlx_dpo.align.mixture import Mixture
from mlx_dpo.align.monitor import Finding
from mlx_dpo.align.trainer import Trainer

MOST = 4  # rescues before a run is given up
_SFT_WEIGHT, _RATE = 1.0, 0.5


class Rescue(NamedTuple):
    """A rescue: the step at which it was called for, the one it went back to, what was changed, and why."""

    called_at: int
    back_to: int
    sft_weight: float
    rate_factor: float
    reason: str

    def in_words(self) -> str:
        """What it changed, as a phrase."""
        if self.rate_factor == 1:
            return f"with the chosen answers' likelihood at weight {self.sft_weight:g} in the loss"
        return f"with the learning rate times {self.rate_factor:g}"


def next_rescue(called_at: int, back_to: int, terms: Mixture, rescues: list[Rescue], found: Finding) -> Rescue:
    """The sft term where the loss has none yet and that could help, half the learning rate otherwise."""
    before = rescues[-1].rate_factor if rescues else 1.0
    weight = terms.likelihood_weight
    if not weight and found.kind == "displacement":
        return Rescue(called_at, back_to, _SFT_WEIGHT, before, found.text)
    return Rescue(called_at, back_to, weight, before * _RATE, found.text)


def refuges(steps: Iterable[int], every: int, healthy: int) -> list[int]:
    """Of the steps with a checkpoint those that a rescue may go back to, the best first.

    Those that --save-every asks for come before others, so that it does not matter whether a run was interrupted.
    """

    def is_regular(step: int) -> bool:
        return step == 0 or (every > 0 and step % every == 0)

    return sorted((step for step in steps if step <= healthy), key=lambda step: (is_regular(step), step), reverse=True)


def apply(trainer: Trainer, rescues: list[Rescue]) -> None:
    """Let a trainer go on as the last rescue has it."""
    if rescues:
        trainer.loss = trainer.loss.with_terms(trainer.loss.terms.with_likelihood(rescues[-1].sft_weight))
        trainer.rate_factor = rescues[-1].rate_factor


def as_numbers(rescues: list[Rescue]) -> list[dict[str, Any]]:
    """Rescues as a checkpoint and a manifest keep them."""
    return [rescue._asdict() for rescue in rescues]


def from_numbers(numbers: list[dict[str, Any]]) -> list[Rescue]:
    """The rescues that a checkpoint keeps."""
    return [Rescue(**entry) for entry in numbers]
