"""docs/cli.md is what the commands say of themselves."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from commands import said

from mlx_dpo.align.options import TrainOptions, flag
from mlx_dpo.chat.options import ChatOptions
from mlx_dpo.convert.fuse_options import FuseOptions

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS = {"train": TrainOptions, "chat": ChatOptions, "fuse": FuseOptions}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_commands_say(maker: ModuleType):
    assert maker.reference() == (DOCS / "cli.md").read_text(encoding="utf-8"), "run python docs/make_cli.py"


@pytest.mark.parametrize("surroundings", [{"COLUMNS": "33"}, {"COLUMNS": "300", "FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_the_reference_does_not_depend_on_the_terminal(
    surroundings: dict[str, str], maker: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert maker.reference() == (DOCS / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["", *sorted(OPTIONS), "convert", "demo", "doctor", "models"])
def test_help_says_it_on_a_terminal_of_80_columns(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    found = said(f"{command} --help", None, capfd)
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    shown = page.partition(f"## {f'mlx_dpo {command}'.strip()}\n\n```text\n")[2].partition("```")[0]
    assert (found.status, found.messages) == (0, "")
    assert [line.rstrip() for line in found.output.splitlines()] == shown.splitlines()


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_every_option_is_explained(command: str):
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    section = page.partition(f"## mlx_dpo {command}\n")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^│[ *]+(--[a-z-]+)", section, re.MULTILINE))
    assert explained == {flag(field.name) for field in fields(OPTIONS[command])} | {"--config", "--debug"}
