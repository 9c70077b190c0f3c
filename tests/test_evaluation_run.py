"""A comparison from questions to report: resumable, the same for all, and honest about what it cannot tell."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import mlx_lm
import numpy as np
import pytest
import runs
from test_data_audit import fair, row_of
from tiny_encoder import write_encoder

from mlx_dpo.align.events import Phase
from mlx_dpo.cli import main
from mlx_dpo.data.asked import Asked
from mlx_dpo.data.templates import Message
from mlx_dpo.evaluation.measures import MEASURES, measured
from mlx_dpo.evaluation.options import EvaluateOptions
from mlx_dpo.evaluation.run import Evaluated, run
from mlx_dpo.models import adapters
from mlx_dpo.models.encoder import load_encoder
from mlx_dpo.models.load import load
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
QUESTIONS = [
    {"question": f"{i}. My mother asks the same again, what now?", "answer": f"Write it on a board, {i} times."}
    for i in range(14)
]

PAIRS = [row_of(one) for one in fair(20)]


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written_adapter(model: Path, out: Path, seed: int) -> Path:
    """An adapter that changes what the model says."""
    loaded = load(model)
    shape = adapters.AdapterShape(4, 20.0, 0.0, adapters.chosen_keys(loaded.model, ()), 2)
    runs.attach(loaded, shape, seed)
    out.mkdir()
    weights = {name: value * (9 if name.endswith("lora_b") else 1) for name, value in adapter_of(loaded).items()}
    adapters.save_adapter(out, weights, shape, str(model))
    return out


def adapter_of(loaded: Any) -> dict[str, Any]:
    return adapters.adapter_weights(loaded.model)


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> EvaluateOptions:
    model = tiny_folder("llama")
    places = {name: written_adapter(model, tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2))}
    return EvaluateOptions(
        model=model,
        data=lines(tmp_path / "test.jsonl", QUESTIONS),
        out=tmp_path / "out",
        adapter=tuple(f"{name}={place}" for name, place in places.items()),
        max_tokens=6,
        batch_size=4,
    )


@pytest.fixture
def encode(tmp_path: Path) -> Any:
    return load_encoder(write_encoder(tmp_path / "encoder", "bert")).encode


def ended(options: EvaluateOptions, encode: Any = None) -> dict[str, Any]:
    *_, end = run(options, encode)
    assert isinstance(end, Evaluated)
    return end.found


def kept(options: EvaluateOptions, name: str) -> list[str]:
    file = options.out / "answers" / f"{name}.jsonl"
    return [json.loads(line)["answer"] for line in file.read_text().splitlines()[1:]]


def test_each_system_answers_as_it_does_alone(options: EvaluateOptions):
    ended(options)
    given = [[Message(role="user", content=row["question"])] for row in QUESTIONS]
    found = {}
    for name, place in (("base", None), ("one", "one"), ("two", "two")):
        model, tokenizer = mlx_lm.load(str(options.model), adapter_path=place and str(options.out.parent / place))[:2]
        end = tokenizer.eos_token_id
        ids = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in given]
        said = [[step.token for step in mlx_lm.stream_generate(model, tokenizer, one, max_tokens=6)] for one in ids]
        found[name] = [tokenizer.decode([token for token in each if token != end]).strip() for each in said]
        assert kept(options, name) == found[name]
    assert found["base"] != found["one"] != found["two"]
    assert kept(options, "prompted base") != found["base"]


def test_a_report_is_written_whole(options: EvaluateOptions, encode: Any):
    found = ended(replace(options, train=lines(options.out.parent / "train.jsonl", PAIRS)), encode)
    assert json.loads((options.out / "report.json").read_text()) == json.loads(json.dumps(found))
    tables = found["all"]
    assert list(tables["systems"]) == ["base", "prompted base", "one", "two"]
    assert list(tables["floors"]) == ["the question itself", "one answer to all", "the nearest answer learnt"]
    assert list(tables["systems"]["base"]) == [measure.name for measure in MEASURES]
    pairs = {(entry["system"], entry["against"]) for entry in tables["differences"]}
    both = [(name, against) for against in ("base", "prompted base") for name in ("one", "two")]
    assert pairs == {*both, ("prompted base", "base")}
    card, page = (options.out / "card.md").read_text(), (options.out / "report.html").read_text()
    assert "| base |" in card
    assert page.count("<svg") == 6
    assert all(row["question"] in page for row in QUESTIONS[:12])
    assert "http" not in page.replace("http://www.w3.org", "")


def test_without_an_encoder_nothing_is_measured_by_meaning_and_it_says_so(options: EvaluateOptions):
    found = ended(options)
    assert "cosine" not in found["all"]["systems"]["base"]
    assert found["notes"] == ["There is no sentence encoder, so nothing was measured by meaning."]


def test_a_run_that_was_stopped_anywhere_gives_the_same_report(options: EvaluateOptions):
    whole = ended(options)
    for events in (3, 6, 9):
        part = replace(options, out=options.out.parent / f"part{events}")
        going: Any = run(part, None)
        for _ in range(events):
            next(going)
        going.close()
        file = sorted((part.out / "answers").iterdir())[0]
        with file.open("ab") as broken:
            broken.write(b'{"number": 4, "ans')
        assert without_place(ended(part)) == without_place(whole)


def without_place(found: dict[str, Any]) -> dict[str, Any]:
    made = found["made"] | {"options": found["made"]["options"] | {"out": ""}}
    return found | {"made": made}


def test_a_killed_run_goes_on(options: EvaluateOptions, encode: Any):
    entries = [word for entry in options.adapter for word in ("--adapter", entry)]
    command = [
        sys.executable, "-m", "mlx_dpo", "evaluate", "--model", str(options.model), "--data", str(options.data),
        *entries,
        "--max-tokens", "6", "--batch-size", "4", "--encoder", str(options.out.parent / "encoder"),
    ]  # fmt: skip
    one, other = (options.out.parent / name for name in ("one whole", "killed"))
    assert subprocess.run([*command, "--out", str(one)], capture_output=True).returncode == 0
    with subprocess.Popen([*command, "--out", str(other)], stdout=-3, stderr=-3) as process:
        while not (other / "answers" / "one.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (other / "report.json").exists()
    assert subprocess.run([*command, "--out", str(other)], capture_output=True).returncode == 0
    reports = [json.loads((out / "report.json").read_text()) for out in (one, other)]
    assert without_place(reports[0]) == without_place(reports[1])


def test_answers_from_anywhere_are_found_by_their_question(options: EvaluateOptions):
    given = [{"question": row["question"].upper(), "answer": row["answer"]} for row in reversed(QUESTIONS)]
    perfect = replace(options, answers=(f"perfect={lines(options.out.parent / 'theirs.jsonl', given)}",), adapter=())
    found = ended(perfect)
    assert found["all"]["systems"]["perfect"]["rouge_l"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    entry = next(e for e in found["all"]["differences"] if e["system"] == "perfect" and e["measure"] == "rouge_l")
    assert entry["better"] == "yes"
    short = replace(perfect, answers=(f"some={lines(options.out.parent / 'some.jsonl', given[:3])}",))
    with pytest.raises(Refusal, match="has no answer to the question of test.jsonl, line 1"):
        ended(short)


def test_questions_near_what_was_learnt_are_counted_apart(options: EvaluateOptions, encode: Any):
    learnt = [row_of(one) for one in fair(20)]
    learnt += [{"prompt": row["question"], "chosen": row["answer"], "rejected": "No."} for row in QUESTIONS[:3]]

    def by_number(texts: Sequence[str]) -> np.ndarray:
        # Texts mean the same when they begin with the same two letters.
        return np.array([[np.cos(sum(text[:2].encode())), np.sin(sum(text[:2].encode()))] for text in texts])

    found = ended(replace(options, train=lines(options.out.parent / "train.jsonl", learnt), adapter=()), by_number)
    assert found["near_questions"] >= 3
    assert len(found["nearness"]) == 14


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adapter": ("mine",)}, "--adapter mine is not of the form NAME="),
        ({"adapter": ("base=x",)}, "Two systems are named base"),
        ({"answers": ("../x=y",)}, "a name has letters"),
    ],
)
def test_systems_that_cannot_be_told_apart_are_refused(options: EvaluateOptions, change: dict[str, Any], sentence: str):
    with pytest.raises(Refusal, match=sentence):
        replace(options, **change)


def test_other_answers_in_the_folder_are_not_taken(options: EvaluateOptions):
    ended(options)
    with pytest.raises(Refusal, match="made with another --max-tokens"):
        ended(replace(options, max_tokens=7))
    lines(options.data, QUESTIONS[1:])
    with pytest.raises(Refusal, match="made with another questions"):
        ended(options)


def test_progress_is_told_system_by_system(options: EvaluateOptions):
    phases = [event for event in run(options, None) if isinstance(event, Phase)]
    assert [p.done for p in phases if p.name == "Answering: one"] == [0, 4, 8, 12, 14]


def test_measures_by_hand():
    asked = [Asked((Message(role="user", content="How much?"),), "Take 5 steps. Rest.", "t")]
    answer = "I'm so sorry. You could take 5 steps or 7 and some donepezil. What worries you?"
    found = {name: float(values[0]) for name, values in measured(asked, [answer], None).items()}
    assert found["new_numbers"] == 1.0
    assert found["new_drugs"] == 1.0
    assert found["objections"] == 0.0
    assert found["empathy"] == pytest.approx(2 / 3)
    assert found["empathy_after_opening"] == pytest.approx(1 / 3)
    assert found["sentence_words"] == pytest.approx(16 / 3)
    assert found["unfinished"] == 0.0


def test_an_echo_of_the_reference_has_the_highest_cosine(encode: Any):
    asked = [Asked((Message(role="user", content=row["question"]),), row["answer"], "t") for row in QUESTIONS]
    echoes = [question.reference or "" for question in asked]
    same, other = (measured(asked, texts, encode)["cosine"] for texts in (echoes, ["x"] * len(asked)))
    assert same == pytest.approx(1.0)
    assert (other < same).all()


def test_the_command_line(options: EvaluateOptions, capfd: pytest.CaptureFixture[str]):
    words = ["evaluate", "--model", str(options.model), "--data", str(options.data), "--out", str(options.out)]
    with pytest.raises(SystemExit) as end:
        main([*words, "--limit", "5", "--max-tokens", "4"])
    assert end.value.code == 0
    said = capfd.readouterr()
    assert said.out.startswith("5 questions; means with 95% intervals")
    assert f"Report:  {options.out / 'report.html'}" in said.out


class _Spoken(BaseHTTPRequestHandler):
    """A server that answers each question with its words, until it is told to be broken."""

    asked: ClassVar[list[dict[str, Any]]] = []
    broken: ClassVar[bool] = False

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        reply = {"choices": [{"message": {"content": f" {body['messages'][-1]['content']} "}}]}
        self.send_response(500 if self.broken else 200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    _Spoken.asked.clear()
    _Spoken.broken = False
    with ThreadingHTTPServer(("127.0.0.1", 0), _Spoken) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()
        thread.join()


def test_an_endpoint_is_asked_only_when_given_and_only_once(options: EvaluateOptions, server: str):
    plain = replace(options, adapter=(), limit=3)
    ended(plain)
    assert _Spoken.asked == []
    with_it = replace(plain, endpoint=(f"theirs={server}",), endpoint_model="big")
    found = ended(with_it)
    assert kept(with_it, "theirs") == [row["question"] for row in QUESTIONS[:3]]
    assert [(each["path"], each["model"], each["temperature"]) for each in _Spoken.asked] == [
        ("/v1/chat/completions", "big", 0)
    ] * 3
    assert [each["messages"] for each in _Spoken.asked] == [
        [{"role": "user", "content": row["question"]}] for row in QUESTIONS[:3]
    ]
    assert ended(with_it) == found
    assert len(_Spoken.asked) == 3


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("http://127.0.0.1:9/v1", "cannot be reached"), ("broken", "answered with status 500"), ("ftp://x", "is no URL")],
)
def test_an_endpoint_that_gives_nothing_is_named(options: EvaluateOptions, server: str, url: str, sentence: str):
    _Spoken.broken = url == "broken"
    place = server if url == "broken" else url
    with pytest.raises(Refusal, match=sentence):
        ended(replace(options, adapter=(), limit=2, endpoint=(f"theirs={place}",)))
