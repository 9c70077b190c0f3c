"""Sentence encoders in MLX are those of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from goldens.make_encoder import FILE, expected
from tiny_encoder import HIDDEN, KINDS, LONGEST, TEXTS, write_encoder

from mlx_dpo.convert.encoder_wheel import encoder_at_hand, fetched_encoder
from mlx_dpo.models.encoder import load_encoder
from mlx_dpo.refusal import Refusal


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, kind: str):
    found = load_encoder(write_encoder(tmp_path / kind, kind)).encode(TEXTS)
    assert found.dtype == np.float32
    assert np.abs(found - np.load(FILE)[kind]).max() < 1e-5


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "first", "max"])
@pytest.mark.parametrize("normalises", [True, False])
def test_vectors_are_those_of_sentence_transformers_live(tmp_path: Path, kind: str, pooling: str, normalises: bool):
    folder = write_encoder(tmp_path / kind, kind, pooling, normalises=normalises)
    wanted = expected(folder, TEXTS)
    assert np.abs(load_encoder(folder).encode(TEXTS) - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


@pytest.mark.reference
def test_the_real_encoder_is_sentence_transformers_one():
    *_, folder = fetched_encoder()
    assert isinstance(folder, Path)
    assert folder == encoder_at_hand()
    assert np.abs(load_encoder(folder).encode(TEXTS) - expected(folder, TEXTS)).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_s_vector_depends_on_no_other_text(tmp_path: Path, kind: str):
    encoder = load_encoder(write_encoder(tmp_path / kind, kind))
    together = encoder.encode(TEXTS * 20)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert together.shape == (20 * len(TEXTS), HIDDEN)
    assert np.abs(together - np.tile(alone, (20, 1))).max() < 1e-6


def test_a_long_text_is_cut(tmp_path: Path):
    encoder = load_encoder(write_encoder(tmp_path / "bert", "bert"))
    word = "the " * (LONGEST - 2)
    assert np.array_equal(encoder.encode([word + "night"]), encoder.encode([word]))
    assert not np.allclose(encoder.encode([word]), encoder.encode(["the " * (LONGEST - 3)]))


def changed(folder: Path, file: str, **entries: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda at: (at / "config.json").unlink(), "holds no config.json"),
        (lambda at: changed(at, "config.json", model_type="roberta"), "holds a roberta model"),
        (lambda at: changed(at, "config.json", hidden_act="swish"), "has an activation or positions"),
        (lambda at: changed(at, "1_Pooling/config.json", pooling_mode_max_tokens=True), "pools by pooling_mode_mean"),
        (lambda at: (at / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
        (lambda at: (at / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda at: (at / "model.safetensors").write_bytes(b"x"), "is cut off or not a safetensors file"),
        (lambda at: without(at, "encoder.layer.1.output.dense.bias"), "lacks encoder.layer.1.output.dense.bias"),
    ],
)  # fmt: skip
def test_what_is_no_encoder_is_refused(tmp_path: Path, break_it: Any, sentence: str):
    folder = write_encoder(tmp_path / "bert", "bert")
    break_it(folder)
    with pytest.raises(Refusal, match=sentence):
        load_encoder(folder)


def without(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    del weights[name]
    safetensors.numpy.save_file(weights, file)


def test_another_step_after_the_model_is_refused(tmp_path: Path):
    folder = write_encoder(tmp_path / "bert", "bert")
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(Refusal, match="has a step Dense"):
        load_encoder(folder)
