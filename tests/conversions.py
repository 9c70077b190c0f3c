"""What the tests of conversion share: run one, read its logits, or its refusal."""

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.events import Converted
from mlx_dpo.refusal import Refusal


def converted(source: Path, out: Path, **options: Any) -> Converted:
    """Convert and return the last event."""
    last = list(convert(str(source), out, **options))[-1]
    assert isinstance(last, Converted)
    return last


def refusal(source: Path, out: Path, **options: Any) -> str:
    """The sentence with which a conversion is refused, quickly and without leaving anything."""
    started = time.monotonic()
    with pytest.raises(Refusal) as caught:
        list(convert(str(source), out, **options))
    assert time.monotonic() - started < 20
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if ".part-" in path.name] == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    """float32 logits (positions, vocabulary) of a folder as plain mlx-lm opens it."""
    loaded: Any = mlx_lm.load(str(folder))
    loaded[0].set_dtype(mx.float32)
    return np.array(loaded[0](mx.array([ids]))[0])
