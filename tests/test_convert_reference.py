"""Conversions against the programs that the formats come from: torch and transformers, live."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType as Kind
from goldens.make_convert import FOLDER, IDS, MODELS, written

from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.pytorch import pytorch_tensors
from mlx_dpo.convert.verify import AWKWARD_TEXTS

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")


def logits(folder: Path) -> np.ndarray:
    loaded: Any = mlx_lm.load(str(folder))
    loaded[0].set_dtype(mx.float32)
    return np.array(loaded[0](mx.array([IDS]))[0])


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_a_folder_that_transformers_wrote_gives_pytorchs_logits(family: str, pickled: bool, tmp_path: Path):
    expected = written(tmp_path / "source", family, seed=11, pickled=pickled)
    tiny.write_tokenizer(tmp_path / "source")
    list(convert(str(tmp_path / "source"), tmp_path / "out"))
    assert close(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", MODELS)
def test_the_goldens_are_what_these_versions_give(family: str, tmp_path: Path):
    expected = written(tmp_path / "source", family, list(MODELS).index(family), pickled=family == "llama")
    assert close(np.load(FOLDER / family / "logits.npy"), expected)


def test_every_kind_of_number_that_torch_saves_is_read(tmp_path: Path):
    kinds = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    table: dict[str, Any] = {str(kind): (torch.arange(24).reshape(4, 6) * 3).to(kind) for kind in kinds}
    table["double"] = torch.arange(6).double() / 3
    table["bool"] = torch.tensor([True, False])
    table["turned"] = table["torch.float32"].t()
    table["part"] = table["torch.float32"][1:3, 2:5]
    table["parameter"] = torch.nn.Parameter(torch.ones(3))
    torch.save(table, tmp_path / "w.bin")
    read = dict(pytorch_tensors(tmp_path / "w.bin"))
    assert read.keys() == table.keys()
    for name, value in table.items():
        expected = value.detach().float().numpy()
        assert np.array_equal(np.array(read[name].astype(mx.float32)), expected), name


def test_k_quants_are_what_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM

    wide = tiny.FAMILIES["llama"] | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    monkeypatch.setitem(tiny.FAMILIES, "wide", wide)
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny.write_model(tmp_path / "wide", "wide"), Kind.Q4_K)
    list(convert(str(file), tmp_path / "out", dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(logits(tmp_path / "out"), theirs(torch.tensor([IDS])).logits[0].numpy())


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize("family", ["llama", "mistral"])  # for others transformers leaves hyperparameters unread
def test_a_gguf_file_gives_the_logits_and_tokens_that_transformers_reads_from_it(
    family: str, kind: Kind, tiny_folder: Any, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder(family), kind)
    list(convert(str(file), tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0].numpy()
    assert close(logits(tmp_path / "out"), expected)
    tokens = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours: Any = mlx_lm.load(str(tmp_path / "out"))[1]
    for text in AWKWARD_TEXTS:
        assert ours.encode(text) == tokens.encode(text, add_special_tokens=False), text
