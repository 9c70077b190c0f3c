"""Folders that cannot be converted: one sentence each, and nothing left."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conversions import refusal

from mlx_dpo.convert.conversion import convert
from mlx_dpo.refusal import Refusal

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


def _with_nan(source: Path) -> None:
    weights: Any = mx.load(str(source / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(64) == 3, mx.nan, weights[name])
    mx.save_safetensors(str(source / "model.safetensors"), weights)


def _cut(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _without_a_layer(source: Path) -> None:
    weights: Any = mx.load(str(source / "model.safetensors"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(source / "model.safetensors"), weights)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (_with_nan, "not finite"),
    "cut off": (_cut, "model.safetensors"),
    "a layer short": (_without_a_layer, "up_proj"),
    "no configuration": (lambda s: (s / "config.json").unlink(), "config.json"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "safetensors"),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), "tokenizer"),
    "configuration no JSON": (lambda s: (s / "config.json").write_text("{"), "config.json"),
    "unknown model": (lambda s: changed(s / "config.json", model_type="martian"), "martian"),
    "runs code": (lambda s: changed(s / "config.json", model_file="evil.py"), "evil.py"),
    "tokenizer runs code": (
        lambda s: changed(s / "tokenizer_config.json", auto_map={"AutoTokenizer": "x.X"}),
        "auto_map",
    ),
    "other sizes": (lambda s: changed(s / "config.json", intermediate_size=256), "llama"),
    "sizes no numbers": (lambda s: changed(s / "config.json", num_hidden_layers="two"), "llama"),
    "rope no numbers": (lambda s: changed(s / "config.json", rope_parameters={"rope_theta": "x"}), ""),
    "an adapter": (lambda s: (s / "config.json").rename(s / "adapter_config.json"), "adapter"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(what: str, copied: Folder, tmp_path: Path):
    damage, said = BROKEN[what]
    source = copied("llama")
    damage(source)
    assert said in refusal(source, tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(copied: Folder, tmp_path: Path):
    source = copied("llama")
    weights: Any = mx.load(str(source / "model.safetensors"))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:50]
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    changed(source / "config.json", vocab_size=50)
    assert "belong together" in refusal(source, tmp_path / "out")


def test_an_occupied_or_impossible_place_is_refused(tiny_folder: Folder, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("full", "file", "file/below"):
        with pytest.raises(Refusal, match="file" if "file" in out else "full"):
            list(convert(str(tiny_folder("llama")), tmp_path / out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from mlx_dpo.convert.conversion import convert
from mlx_dpo.refusal import Refusal
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    list(convert(sys.argv[1], Path(sys.argv[2])))
except Refusal as refusal:
    sys.exit(str(refusal))
"""


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_file_that_cannot_grow_is_refused_and_leaves_nothing(room: int, tiny_folder: Folder, tmp_path: Path):
    command = [sys.executable, "-c", FULL_DISK, str(tiny_folder("llama")), str(tmp_path / "out"), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "room" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_conversion_is_given_up(tiny_folder: Folder, tmp_path: Path):
    running = convert(str(tiny_folder("llama")), tmp_path / "out")
    for event in running:
        if "Comparing" in getattr(event, "text", ""):
            break
    assert len(list(tmp_path.iterdir())) == 1
    running.close()
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_nothing_is_refused_with_what_there_is(tmp_path: Path):
    for source in ("./nothing-here", "a/b/c", "missing.gguf", "no such thing"):
        assert "smollm2-135m-instruct" in refusal(Path(source), tmp_path / "out")
    (tmp_path / "notes.txt").write_text("text")
    assert "GGUF" in refusal(tmp_path / "notes.txt", tmp_path / "out")
