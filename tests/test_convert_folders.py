"""Folders in Hugging Face layout: the same model afterwards, whoever wrote the configuration, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
import tiny_gguf
from conversions import converted, logits, refusal
from goldens.make_convert import IDS, MODELS
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig

from mlx_dpo.convert import folder_source, huggingface, verify
from mlx_dpo.convert.rotations import use_rotations
from mlx_dpo.models.load import load

GOLDENS = Path(__file__).parent / "goldens" / "convert"
Folder = Callable[[str], Path]


@pytest.fixture
def copied(tiny_folder: Folder, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny folder to change."""

    def copy(family: str = "llama") -> Path:
        return Path(shutil.copytree(tiny_folder(family), tmp_path / f"source-{family}"))

    return copy


def changed(path: Path, **entries: Any) -> None:
    read = json.loads(path.read_text())
    kept = {key: value for key, value in (read | entries).items() if value is not None}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_converted_model_is_the_model(
    family: str, tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    done = converted(tiny_folder(family), tmp_path / "out")
    assert np.array_equal(logits(tmp_path / "out", IDS), logits(tiny_folder(family), IDS))
    assert done.checks.max_logit_difference < 1e-3
    assert done.checks.top_token_agreement == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", MODELS)
def test_what_transformers_5_wrote_gives_the_logits_that_pytorch_gave(family: str, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / family, source)
    tiny.write_tokenizer(source)
    converted(source, tmp_path / "out")
    expected = np.load(source / "logits.npy")
    assert np.abs(logits(tmp_path / "out", IDS) - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_generations_of_configurations_give_one_model(family: str, copied: Folder, tmp_path: Path):
    source = copied(family)
    before = logits(source, IDS)
    AutoConfig.from_pretrained(source).save_pretrained(source)
    written = json.loads((source / "config.json").read_text())
    inner = written.get("text_config", written)
    assert "rope_parameters" in inner
    converted(source, tmp_path / "out")
    assert np.array_equal(logits(tmp_path / "out", IDS), before)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "mistral", "gemma3_text", "gemma3"])
def test_a_rope_setting_that_is_lost_is_noticed(
    family: str, copied: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = copied(family)
    settings = json.loads((source / "config.json").read_text())
    inner = settings.get("text_config", settings)
    inner["rope_theta"] = 300_000.0  # no library's default
    (source / "config.json").write_text(json.dumps(settings))
    AutoConfig.from_pretrained(source).save_pretrained(source)
    monkeypatch.setattr(huggingface, "with_rope_at_top", lambda config: config)
    assert "logits differ" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_sources_side_rotates_by_itself(family: str, tiny_folder: Folder):
    folder = tiny_folder(family)
    model, _ = folder_source.opened(folder, huggingface.written_config(folder), "here")
    assert use_rotations(model, huggingface.transformers_config(folder))


def test_a_default_that_transformers_leaves_out_is_filled_in(copied: Folder, tmp_path: Path):
    source = copied("mistral")
    changed(source / "config.json", tie_word_embeddings=None, rope_theta=None)
    converted(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # mlx-lm's own default would tie the head to the embedding and drop it
    assert written["tie_word_embeddings"] is False
    assert written["rope_theta"] == 10_000


def test_only_the_models_own_files_are_taken_along(copied: Folder, tmp_path: Path):
    source = copied("llama")
    (source / "modeling_llama.py").write_text("raise SystemExit")
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nText")
    (source / "chat_template.jinja").write_text(tiny.CHATML)
    done = converted(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "manifest.json",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert done.licence == manifest["licence"] == "apache-2.0"
    assert set(manifest["source"]["sha256"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert manifest["verify"]["layers"] == 2


def test_shards_are_put_together(copied: Folder, tmp_path: Path):
    source = copied("llama")
    before = logits(source, IDS)
    weights: Any = mx.load(str(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    for place, part in enumerate((names[::2], names[1::2]), 1):
        mx.save_safetensors(str(source / f"model-{place:05d}-of-00002.safetensors"), {n: weights[n] for n in part})
    index = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    converted(source, tmp_path / "out")
    assert np.array_equal(logits(tmp_path / "out", IDS), before)
    (source / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002" in refusal(source, tmp_path / "again")


@pytest.mark.parametrize("bits", ["4", "6", "8"])
def test_quantising_is_mlxs_own(bits: Any, tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    done = converted(tiny_folder("qwen3"), tmp_path / "out", quantize=bits)
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    source: Any = mx.load(str(tiny_folder("qwen3") / "model.safetensors"))
    name = "model.layers.0.self_attn.q_proj"
    for part, expected in zip(
        ("weight", "scales", "biases"),
        mx.quantize(source[f"{name}.weight"], group_size=64, bits=int(bits)),
        strict=True,
    ):
        assert mx.array_equal(held[f"{name}.{part}"], expected).item()
    assert done.checks.tolerance is None
    assert done.checks.mean_kl > 0
    assert capfd.readouterr() == ("", "")


def test_rows_that_64_does_not_divide_get_groups_of_32(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "qwen3", source)
    tiny.write_tokenizer(source)
    done = converted(source, tmp_path / "out", quantize="4")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    # rows of 32 numbers, except where 64 come in: down from the inner size, and out of four heads of 16
    assert (settings["group_size"], settings["model.layers.0.mlp.down_proj"]["group_size"]) == (32, 64)
    assert done.quantisation == "4 bit (group 32), 4 bit (group 64)"
    assert logits(tmp_path / "out", IDS).shape == (len(IDS), 400)


def test_a_quantised_source_is_kept_undone_and_done_anew(tiny_folder: Folder, tmp_path: Path):
    converted(tiny_folder("llama"), tmp_path / "four", quantize="4", dtype="float16")
    converted(tmp_path / "four", tmp_path / "kept")
    four: Any = mx.load(str(tmp_path / "four" / "model.safetensors"))
    kept: Any = mx.load(str(tmp_path / "kept" / "model.safetensors"))
    assert four.keys() == kept.keys()
    assert all(mx.array_equal(four[name], kept[name]).item() for name in four)
    undone = converted(tmp_path / "four", tmp_path / "undone", quantize="none")
    assert undone.quantisation == "none (float16)"
    plain: Any = mx.load(str(tmp_path / "undone" / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj"
    parts = [four[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    exact = mx.dequantize(parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32), 64, 4)
    assert mx.array_equal(plain[f"{name}.weight"], exact.astype(mx.float16)).item()
    assert converted(tmp_path / "four", tmp_path / "eight", quantize="8").quantisation == "8 bit (group 64)"


def test_scales_are_never_rounded_while_blocks_are_kept(tiny_folder: Folder, tmp_path: Path):
    converted(tiny_folder("llama"), tmp_path / "four", quantize="4", dtype="float16")
    assert "--quantize none" in refusal(tmp_path / "four", tmp_path / "out", dtype="bfloat16")
    assert converted(tmp_path / "four", tmp_path / "wide", dtype="float32").checks.max_logit_difference < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_reported_and_everything_else_is_refused(
    dtype: Any, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = converted(tiny_folder("qwen3"), tmp_path / "out", dtype=dtype)
    assert 1e-4 < done.checks.max_logit_difference < 0.5
    assert load(tmp_path / "out").config["torch_dtype"] == dtype
    wrong = folder_source.recast
    monkeypatch.setattr(folder_source, "recast", lambda model, to, where: _with_changed_norm(wrong(model, to, where)))
    assert "logits differ" in refusal(tiny_folder("qwen3"), tmp_path / "wrong", dtype=dtype)


def _with_changed_norm(model: Any) -> Any:
    model.model.norm.weight = model.model.norm.weight * 1.05
    return model


def test_a_vocabulary_with_only_sentence_pieces_model_gets_its_ids(copied: Folder, tmp_path: Path):
    source = copied("mistral")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    pieces = tiny_gguf.trained_pieces()
    (source / "tokenizer.model").write_bytes(pieces)
    done = converted(source, tmp_path / "out")
    assert done.checks.tokenizer_peer == "SentencePiece"
    assert done.checks.texts >= 20
    tokenizer: Any = mlx_lm.load(str(tmp_path / "out"))[1]
    processor: Any = SentencePieceProcessor(model_proto=pieces)
    text = " tea  and\n\na cup, 12 ☕"
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    (source / "tokenizer.model").write_bytes(pieces[:700] + b"\xff\xff")
    assert "tokenizer.model" in refusal(source, tmp_path / "again")


def test_other_tokens_than_the_sources_are_refused(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def lossy(folder: Path, out: Path) -> list[str]:
        names = huggingface.copy_texts(folder, out)
        made = json.loads((out / "tokenizer.json").read_text())
        made["pre_tokenizer"]["add_prefix_space"] = True
        (out / "tokenizer.json").write_text(json.dumps(made))
        return names

    monkeypatch.setattr(folder_source, "copy_texts", lossy)
    assert "other token ids" in refusal(tiny_folder("llama"), tmp_path / "out")


def test_a_model_that_does_not_fit_is_checked_as_far_as_it_does(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verify, "_FEWEST_LAYERS", 1)
    monkeypatch.setattr(verify, "_SHARE_OF_MEMORY", 1e-9)
    done = converted(tiny_folder("llama"), tmp_path / "out")
    assert (done.checks.layers, done.checks.all_layers) == (1, 2)
    assert done.checks.max_logit_difference < 1e-3
