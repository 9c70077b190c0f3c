"""The conversation as a person at a terminal, a screen reader or a script meets it."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pexpect
import pytest
import tiny
from mlx.utils import tree_flatten
from rich.console import Console

from mlx_dpo.chat.markdown import Block, settled
from mlx_dpo.chat.options import ChatOptions
from mlx_dpo.chat.terminal import GREETING, run
from mlx_dpo.models.load import load
from mlx_dpo.refusal import Refusal

# From Python 3.12 on a fork beside MLX's threads warns; the child becomes another program at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
DRIVER = """
import json, sys
from pathlib import Path
from mlx_dpo.chat.terminal import ChatOptions, run
from mlx_dpo.models.load import load
from mlx_dpo.refusal import Refusal
options = json.loads(sys.argv[1])
try:
    sys.exit(run(ChatOptions(**options | {"model": Path(options["model"])}), *(sys.argv[2:] or [None])))
except Refusal as refusal:
    sys.exit(str(refusal))
"""
FIELDS = [
    "question",
    "answer",
    "finish_reason",
    "prompt_tokens",
    "reused_tokens",
    "answer_tokens",
    "seconds_to_first_token",
    "tokens_per_second",
    "seed",
    "model",
    "adapter",
]
ANSWERING = re.compile("(?s).{1500}")  # more than the line editor's echo of a question


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose likeliest answer goes on for ever: its control tokens have the logit 0."""
    folder = tiny.write_model(tmp_path_factory.mktemp("endless") / "model", "llama-untied")
    weights = dict(tree_flatten(load(folder).model.parameters()))
    weights["lm_head.weight"][:4] = 0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    return folder


def command(model: Path, *question: str, **options: object) -> list[str]:
    settings = {"model": str(model), "temperature": 0.0, "max_tokens": 12} | options
    return [sys.executable, "-c", DRIVER, json.dumps(settings), *question]


def test_json_is_one_object_with_stable_fields_and_nothing_else(endless: Path, tiny_folder: Callable):
    done = subprocess.run(command(endless, "Hello", json=True, seed=7), capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert list(record) == FIELDS
    assert (record["question"], record["seed"], record["adapter"]) == ("Hello", 7, None)
    assert (record["finish_reason"], record["answer_tokens"], record["reused_tokens"]) == ("length", 12, 0)
    assert record["model"] == str(endless)
    assert GREETING in done.stderr
    plain = subprocess.run(command(endless), input=b"Hello\n", capture_output=True, check=True)
    printed = plain.stdout.decode()
    assert printed == "".join(c for c in record["answer"] if c.isprintable() or c in "\n\t") + "\n"
    assert "cut off after 12 tokens" in plain.stderr.decode()


def test_a_reader_that_goes_away_ends_it_quietly(endless: Path):
    with subprocess.Popen(
        command(endless, "Hello", max_tokens=100_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        messages = process.stderr.read().decode()
        assert process.wait(20) == 0
    assert messages.splitlines() == [GREETING, f"Loading {endless} …"]


@pytest.mark.parametrize(("typed", "said"), [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "not UTF-8")])
def test_what_is_piped_in_has_to_be_a_question(
    tiny_folder: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: bytes, said: str
):
    (tmp_path / "typed").write_bytes(typed)
    with (tmp_path / "typed").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(Refusal, match=said):
            run(ChatOptions(model=tiny_folder("llama")), None)


@pytest.fixture
def terminal() -> Iterator[Callable[..., pexpect.spawn]]:
    children: list[pexpect.spawn] = []

    def spawn(arguments: list[str]) -> pexpect.spawn:
        child = pexpect.spawn(
            arguments[0],
            arguments[1:],
            encoding="utf-8",
            timeout=15,
            dimensions=(24, 80),
            env={"PATH": "/usr/bin:/bin", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "LANG": "C.UTF-8"},
        )
        child.delaybeforesend = None
        children.append(child)
        return child

    yield spawn
    for child in children:
        child.close(force=True)


def test_an_evening_at_the_terminal(endless: Path, terminal: Callable[..., pexpect.spawn]):
    child = terminal(command(endless, max_tokens=100_000))

    def typed(text: str) -> None:
        child.expect("You ›")
        child.send(text)

    def interrupted() -> None:
        child.expect(ANSWERING)
        child.sendintr()
        child.expect(r"\(stopped\)")

    child.expect("not with a clinician")
    typed("half a line\x03")  # Ctrl-C clears it
    child.expect("Ctrl-D or /quit leaves")
    typed("first\x1b\rsecond\r")  # Alt-Enter
    interrupted()
    typed("/stats\r")
    child.expect(r"turns 1, seed \d+")
    child.expect("ended by interrupted")
    typed("\x1b[200~pasted\nin two lines\x1b[201~\r")
    interrupted()
    typed("/regenerate\r")
    interrupted()
    typed("/undo\r")
    child.expect("Taken back: pasted")
    typed("/nothing\r")
    child.expect("There is no /nothing")
    typed("\x04")
    child.expect("Goodbye")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_plain_moves_no_cursor_and_takes_a_paste_as_one_message(endless: Path, terminal: Callable[..., pexpect.spawn]):
    child = terminal(command(endless, plain=True))
    child.expect("You: ")
    heard = str(child.before)
    child.send("first\nsecond\n")
    child.expect("cut off")
    heard += str(child.before)
    child.expect("You: ")
    # A signal just before the system begins to read is heard only after it: nobody's fingers are that fast.
    time.sleep(0.3)
    child.sendintr()
    child.expect("Ctrl-D or /quit leaves")
    child.expect("You: ")
    child.send("/stats\n")
    child.expect("turns 1, ")
    child.expect("You: ")
    child.send("\x04")
    child.expect("Goodbye")
    child.expect(pexpect.EOF)
    heard += str(child.before)
    assert "\x1b" not in heard
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_ends_a_single_answer_with_130(endless: Path, terminal: Callable[..., pexpect.spawn]):
    child = terminal(command(endless, "Hello", plain=True, max_tokens=100_000))
    child.expect("Loading .*…")
    child.expect(ANSWERING)
    child.sendintr()
    child.expect(r"\(stopped\)")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


MARKDOWN = """Some **bold** words
on two lines.

1. one
   more of one

   still one
2. two

```
code

more code
```

The <b>end</b> of [it](http://127.0.0.1/x).
"""


def test_paragraphs_settle_at_blank_lines_outside_code_and_lists():
    growing, blocks = "", []
    for character in MARKDOWN:
        growing += character
        if end := settled(growing):
            blocks.append(growing[:end])
            growing = growing[end:]
    assert "".join([*blocks, growing]) == MARKDOWN
    assert [block.split()[0] for block in [*blocks, growing]] == ["Some", "1.", "```", "The"]


def test_markdown_loses_nothing_and_fits_the_screen():
    console = Console(width=60, height=10, color_system=None)
    with console.capture() as whole:
        console.print(Block(MARKDOWN, 40))
    lines = whole.get().splitlines()
    assert lines[:2] == ["Some bold words", "on two lines."]
    assert "<b>end</b>" in whole.get()
    assert "127.0.0.1" in whole.get()
    assert max(map(len, lines)) <= 40
    with console.capture() as end:
        console.print(Block(MARKDOWN, 40, growing=True))
    assert end.get().splitlines() == lines[-8:]
