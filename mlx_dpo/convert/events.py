"""What a conversion says while it runs."""

from pathlib import Path
from typing import NamedTuple


class Phase(NamedTuple):
    """A stretch of work begins; `text` is a sentence for the screen."""

    text: str


class Progress(NamedTuple):
    """How far the phase is, in `unit`s."""

    done: int
    total: int
    unit: str


class Checks(NamedTuple):
    """What the conversion measured on its own result.

    `texts` strings gave the same token ids as `tokenizer_peer`; the logits (natural units, float32 arithmetic) were
    compared with `logits_peer` at `positions` positions over `layers` of `all_layers` layers.
    """

    texts: int
    tokenizer_peer: str
    logits_peer: str
    positions: int
    layers: int
    all_layers: int
    max_logit_difference: float
    mean_kl: float
    top_token_agreement: float
    tolerance: float | None


class Converted(NamedTuple):
    """The end: a folder that `mlx_lm.load` opens, and the checks that it passed."""

    folder: Path
    checks: Checks
    quantisation: str
    licence: str | None


Event = Phase | Progress | Converted
