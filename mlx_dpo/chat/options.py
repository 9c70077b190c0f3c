"""What a conversation can be asked for."""

import math
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.refusal import Refusal
from mlx_dpo.whole import Whole


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; raises Refusal for values that make no sense.

    A temperature of 0 takes the likeliest token; a seed of None draws a seed. Nucleus sampling (`top_p`)
    as in Holtzman et al. 2020 (arXiv:1904.09751), on the probabilities before the temperature, as mlx-lm
    has it. The defaults leave out the unlikely tenth of the words and prefer the likelier of the rest.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise Refusal(f"--temperature {self.temperature} makes no sense: choose a number from 0 to 2.")
        if not 0 < self.top_p <= 1:
            raise Refusal(f"--top-p {self.top_p} makes no sense: choose a number above 0, up to 1.")
        if not 1 <= self.max_tokens <= 1_000_000:
            raise Refusal(f"--max-tokens {self.max_tokens} makes no sense: choose from 1 to 1000000.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise Refusal(f"--seed {self.seed} makes no sense: choose a whole number from 0 to 2^63 - 1.")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What a conversation is held with; raises Refusal for values that make no sense."""

    model: Path
    """Folder of the model, as convert or fuse wrote it."""
    adapter: Path | None = None
    """Folder of an adapter that was trained on this model."""
    system: str | None = None
    """System prompt; without it the model's own chat template decides."""
    plain: bool = False
    """No colour, no layout, no cursor movement: for screen readers and pipes."""
    json: bool = False
    """Answer one question with one JSON object on standard output."""
    seed: Whole | None = Sampling.seed
    """Number that makes the answers repeatable; without it one is drawn (--json and /stats name it)."""
    temperature: float = Sampling.temperature
    """How freely words are drawn, 0 to 2; 0 takes the likeliest every time."""
    top_p: float = Sampling.top_p
    """Draw from the likeliest tokens that together have this probability, above 0 and up to 1."""
    max_tokens: Whole = Sampling.max_tokens
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        _ = self.sampling
        if self.system is not None and not self.system.strip():
            raise Refusal("--system is empty: write a system prompt, or leave the option out.")

    @property
    def sampling(self) -> Sampling:
        """Those of the options that say how answers are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=self.seed)
