"""What sentence-transformers makes of a few texts with tiny encoders of both kinds.

Needs the extra `reference`. Run `python tests/goldens/make_encoder.py` to write tests/goldens/encoder.npz anew.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_encoder import KINDS, TEXTS, write_encoder  # noqa: E402

FILE = Path(__file__).with_name("encoder.npz")


def expected(folder: Path, texts: list[str]) -> np.ndarray:
    """The vectors, (texts, width) float32."""
    from sentence_transformers import SentenceTransformer

    return np.asarray(SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False))


def main() -> None:
    """Write the goldens."""
    with tempfile.TemporaryDirectory() as here:
        found = {kind: expected(write_encoder(Path(here) / kind, kind), TEXTS) for kind in KINDS}
    np.savez(FILE, **found)


if __name__ == "__main__":
    main()
