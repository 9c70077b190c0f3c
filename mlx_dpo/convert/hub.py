"""A snapshot from the Hugging Face Hub, fetched by a child process so that this one stays offline."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.convert.events import Event, Phase, Progress
from mlx_dpo.refusal import Refusal

# Weights as safetensors alone: nothing that could run, no second copy in another format.
_PATTERNS = (
    "*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "LICENCE*",
    "NOTICE*", "*USE_POLICY*",
)  # fmt: skip
_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# The child speaks JSON lines: how far it is, then where the snapshot lies or why there is none.
_CHILD = """
import json, sys
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
def say(**what):
    sys.stdout.write(json.dumps(what) + "\\n"); sys.stdout.flush()
class Bar(tqdm):
    def __init__(self, *args, **options):
        self.in_bytes = options.get("unit") == "B"
        options["disable"] = False
        super().__init__(*args, file=open("/dev/null", "w"), **{k: v for k, v in options.items() if k != "file"})
    def display(self, *args, **options):
        if self.in_bytes and self.total:
            say(done=int(self.n), total=int(self.total))
        return True
asked = json.loads(sys.argv[1])
try:
    say(folder=snapshot_download(tqdm_class=Bar, **asked))
except Exception as error:
    say(kind=type(error).__name__, kinds=[c.__name__ for c in type(error).__mro__], text=str(error))
"""


class Snapshot(NamedTuple):
    """A folder in the Hub's cache, and the commit it holds."""

    folder: Path
    commit: str


def parsed_id(text: str) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of `owner/name[@revision]`; None for anything else."""
    match = _ID.fullmatch(text)
    return (match["repository"], match["revision"]) if match else None


def fetched(repository: str, revision: str | None) -> Iterator[Event | Snapshot]:
    """Fetch what a conversion needs of a repository; the last thing yielded is the Snapshot.

    Raises Refusal, with what to do about it, where the Hub cannot be reached or does not give the repository out.
    """
    offline = os.environ.get("MLX_DPO_USER_OFFLINE") == "1"
    where = "the local cache of the Hugging Face Hub (offline, as you set)" if offline else "the Hugging Face Hub"
    yield Phase(f"Fetching {repository}{f' at {revision}' if revision else ''} from {where}")
    asked = {"repo_id": repository, "revision": revision, "allow_patterns": list(_PATTERNS)}
    outcome: dict[str, Any] = {}
    done = -1
    for answer in _answers(asked, offline):
        if "total" not in answer:
            outcome = answer
        elif answer["done"] > done:  # two bars count the same bytes, as received and as written
            done = answer["done"]
            yield Progress(done, answer["total"], "bytes")
    if "folder" not in outcome:
        raise _refusal(repository, revision, outcome)
    folder = Path(outcome["folder"])
    yield Snapshot(folder, folder.name)


def _answers(asked: dict[str, Any], offline: bool) -> Iterator[dict[str, Any]]:
    environment = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if not offline:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
            environment.pop(name, None)
    command = [sys.executable, "-c", _CHILD, json.dumps(asked)]
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    finally:
        child.terminate()
        child.communicate()


def _refusal(repository: str, revision: str | None, answer: dict[str, Any]) -> Refusal:
    kinds = answer.get("kinds", [])
    if "GatedRepoError" in kinds:
        return Refusal(
            f"{repository} is gated: accept its terms on its page of the Hub, log in with `hf auth login`, try again."
        )
    if "RevisionNotFoundError" in kinds:
        return Refusal(f"{repository} has no revision {revision}: check it on the repository's page of the Hub.")
    if "RepositoryNotFoundError" in kinds:
        return Refusal(
            f"The Hub shows you no repository {repository}: check the spelling, or log in with `hf auth login`."
        )
    if "OfflineModeIsEnabled" in kinds or "LocalEntryNotFoundError" in kinds or "ConnectError" in kinds:
        return Refusal(
            f"{repository} cannot be fetched, for the Hub is out of reach and no copy is in its cache: connect to the "
            "network, or give a folder that you have."
        )
    reason = " ".join(str(answer.get("text", "the child process ended early")).split())[:300]
    return Refusal(f"{repository} cannot be fetched ({reason}): try again, or give a folder that you have.")
