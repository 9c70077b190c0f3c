"""What a merge can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_dpo.whole import Whole


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """What is merged into what, and what it is measured on."""

    model: Path
    """Folder of the base model that the adapter was trained on."""
    adapter: Path
    """Folder of the adapter."""
    out: Path
    """Folder for the merged model."""
    quantize: Literal["keep", "none", "4", "6", "8"] = "keep"
    """Number format: keep the base's own, none for 16 bit, or so many bits."""
    data: Path | None = None
    """Pairs to measure on. [default: the run's own held-out pairs, else pairs that come with mlx_dpo]"""
    pairs: Whole = 16
    """Measure on so many pairs."""
