"""Nothing leaves this machine: a command that has all it needs opens no socket, and libraries are told so in time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CHAT, CONVERT, FUSE, TRAIN, World, typed

# Runs a module as `python -m` does, in a process that tells of every socket and of every library loaded too early.
WATCHED = """
import os, runpy, socket, sys

def hook(event, arguments):
    if event == "socket.__new__" and arguments[1] in (socket.AF_INET, socket.AF_INET6):
        print("REACHES OUT", file=sys.stderr)
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        print("ASKS FOR", arguments, file=sys.stderr)
    if event == "import" and arguments[0] in ("huggingface_hub", "transformers", "datasets"):
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" and os.environ.get("TRANSFORMERS_OFFLINE") == "1"
        print("LOADS", arguments[0], "offline" if offline else "TOO EARLY", file=sys.stderr)

sys.addaudithook(hook)
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def _told(module: str, words: list[str]) -> tuple[int, str]:
    """The status of a command, and what its watcher and itself said; the user's own settings are left out."""
    surroundings = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    command = [sys.executable, "-c", WATCHED, module, *words]
    done = subprocess.run(
        command, env=surroundings, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("mlx_dpo", TRAIN),
        ("mlx_dpo.train", TRAIN.removeprefix("train ")),
        ("mlx_dpo", f"{CHAT} --temperature 0 --adapter {{adapter}}"),
        ("mlx_dpo", FUSE),
        ("mlx_dpo", CONVERT),
    ],
)
def test_a_command_that_has_all_it_needs_opens_no_socket(module: str, command: str, world: World):
    status, messages = _told(module, typed(command, world))
    assert status == 0, messages
    assert "LOADS transformers offline" in messages
    assert not [line for line in messages.splitlines() if line.startswith(("REACHES", "ASKS")) or "EARLY" in line]


def test_the_watcher_sees_what_it_watches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "careless.py").write_text("import socket, huggingface_hub\nsocket.socket().close()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, messages = _told("careless", [])
    assert status == 0, messages
    assert "REACHES OUT" in messages
    assert "LOADS huggingface_hub TOO EARLY" in messages
