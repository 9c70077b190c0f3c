"""Files that mean harm: nothing in them is executed, and none of them takes the machine."""

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from commands import CHAT, CONVERT, TRAIN, Kind, World, refused, said

from mlx_dpo.data import allowance

REACHES = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "reaches for os": (REACHES, ("chat template", "unsafe")),
    "reaches through a class": (
        "{{ ''.__class__.__mro__[1].__subclasses__()[132].__init__.__globals__['system']('touch %s') }}",
        ("chat template", "unsafe"),
    ),
    "writes to its input": ("{{ messages.append(1) }}", ("chat template", "append")),
    "includes a file": ("{% include '/etc/passwd' %}", ("chat template",)),
    "never ends": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        ("chat template", "time or memory"),
    ),
    "a range without end": ("{% for a in range(10**12) %}{% endfor %}", ("chat template", "range")),
    "fills the memory": ("{{ ('a' * 10**11) | length }}", ("chat template", "time or memory")),
    "fills the memory, doubling": (
        "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        ("chat template", "time or memory"),
    ),
    "writes a book": ("{{ 'tea ' * 2000000 }}", ("chat template", "8000000 characters")),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ("chat template", "recursion")),
    "divides by zero": ("{{ 1 // 0 }}", ("chat template", "zero")),
    "refuses": ("{{ raise_exception('roles must alternate') }}", ("chat template", "roles must alternate")),
    "is no template": ("{% for %}", ("chat template",)),
    "says nothing": ("{{ '' }}", ("chat template", "nothing")),
}


def _template(text: str) -> Callable[[World], object]:
    def damage(world: World) -> None:
        path = world.model / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"chat_template": text.replace("%s", str(world.here / "harmed"))}
        path.write_text(json.dumps(settings))

    return damage


@pytest.mark.parametrize("command", [CHAT, TRAIN])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_refused(
    name: str, command: str, world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if "memory" in name and not Path("/proc/self/statm").exists():
        pytest.skip("memory is watched on Linux only")
    monkeypatch.setattr(allowance, "SECONDS", 0.5)
    monkeypatch.setattr(allowance, "BYTES", 2**28)
    text, names = TEMPLATES[name]
    started = time.perf_counter()
    refused(Kind(command, _template(text), names), world, capfd)
    assert time.perf_counter() - started < 8
    assert not (world.here / "harmed").exists()


@pytest.mark.parametrize("command", [CHAT, TRAIN])
def test_a_model_without_a_template_is_refused(command: str, world: World, capfd: pytest.CaptureFixture[str]):
    def damage(place: World) -> None:
        path = place.model / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["chat_template"]
        path.write_text(json.dumps(settings))

    refused(Kind(command, damage, ("no chat template",)), world, capfd)


def _code(world: World, name: str = "evil.py") -> None:
    (world.model / name).write_text(f"open({str(world.here / 'harmed')!r}, 'w').write('x')\n")


@pytest.mark.parametrize("command", [f"{CHAT} --temperature 0", TRAIN, CONVERT])
def test_code_beside_a_model_is_not_run(command: str, world: World, capfd: pytest.CaptureFixture[str]):
    for name in ("modeling_evil.py", "tokenization_evil.py", "sitecustomize.py"):
        _code(world, name)
    path = world.model / "config.json"
    maps = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.EvilConfig"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": maps}))
    found = said(command, world, capfd)
    assert found.status == 0, found.messages
    assert not (world.here / "harmed").exists()
    assert not list(world.out.glob("*.py"))


class _Touch:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_is_not_run(old: bool, world: World, capfd: pytest.CaptureFixture[str]):
    def damage(place: World) -> None:
        (place.model / "model.safetensors").unlink()
        harm = pickle.dumps({"w": _Touch(place.here / "harmed")}, protocol=2)
        # Until 1.6 torch wrote a magic number, a version and the system's facts before the pickle itself.
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) if old else b""
        (place.model / "pytorch_model.bin").write_bytes(head + harm)

    refused(Kind(CONVERT, damage, ("pytorch_model.bin",)), world, capfd)
    assert not (world.here / "harmed").exists()
    pickle.loads(pickle.dumps(_Touch(world.here / "harmed"), protocol=2))
    assert (world.here / "harmed").exists()  # it would have been


GGUF: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:700],
    "cut in the numbers": lambda data: data[:-3000],
    "no GGUF": lambda data: b"PK\x03\x04" + data[4:],
    "of version 77": lambda data: data[:4] + struct.pack("<I", 77) + data[8:],
    "with 2^60 tensors": lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:],
    "with 2^60 facts": lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:],
    "with a name of 2^62 letters": lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:],
    "of noise": lambda data: data[:24] + np.random.default_rng(0).bytes(len(data) - 24),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_lying_gguf_is_refused(name: str, world: World, capfd: pytest.CaptureFixture[str]):
    def damage(place: World) -> None:
        path = tiny_gguf.write(place.here / "file.gguf", place.model)
        path.write_bytes(GGUF[name](path.read_bytes()))

    refused(Kind("convert {here}/file.gguf --out {out}", damage, ("file.gguf",)), world, capfd)
