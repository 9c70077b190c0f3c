"""Plain text, for continued pre-training: read as it stands, tokenised as mlx-lm has it, parted without loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import TextDataset
from mlx_lm.utils import load_tokenizer
from tables import WRITERS, as_csv, stored
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from mlx_dpo.data.examples import Example, Kind, example, missing_columns
from mlx_dpo.data.reading import read, split_off
from mlx_dpo.data.tokenised import CutCounts, TokenisedPair, tokenise
from mlx_dpo.refusal import Refusal

TEXT = "My mother asks again and again, and I am tired.\n\nTry one calm sentence, then a cup of tea.\n"
BOS, EOS = 0, 2
CHAT = {"prompt": "a", "completion": "b"}


def test_the_text_is_taken_as_it_is():
    row = {"text": f"  {TEXT}", "id": 7, "rejected": 3, "label": "x", "prompt": None, "system": ""}
    assert example(row, "here", kind="answers") == Example((), f"  {TEXT}", None, "here")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 3}, "text is a number, not text"),
        ({"text": ["a"]}, "text is a list, not text"),
        ({"text": float("nan")}, "text is NaN (a missing value), not text"),
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "", "prompt": "", "completion": ""}, "text is empty"),
        ({"text": "a\x00"}, "text has a NUL character at character 2"),
        ({"text": '[{"role": "user"'}, "text is a list of messages written as text: give messages as a list"),
        ({"text": None}, "an answer (chosen, completion, messages or text) is missing"),
        ({"text": "a", "prompt": "b"}, "has text beside prompt: give either"),
        ({"text": "a", "chosen": "b", "rejected": "c"}, "has text beside chosen: give either"),
        ({"text": "a", "messages": []}, "has text beside messages: give either"),
        ({"text": "a", "system": "b"}, "has text beside system: give either"),
        ({"text": 3, "system": "b", "prompt": "c", "completion": "d"}, "beside prompt, completion and system: give"),
    ],
)
def test_a_bad_text_says_why(row: object, reason: str):
    made = example(row, "here", kind="answers")
    assert isinstance(made, list)
    (said,) = made
    assert reason in said


@pytest.mark.parametrize("kind", ["pairs", "thumbs"])
def test_where_other_rows_are_learnt_a_text_is_not_looked_at(kind: Kind):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert example(pair | {"text": 3}, "here", kind=kind) == example(pair, "here", kind=kind)
    assert missing_columns(["text"], kind=kind) is not None


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_may_hold_texts_and_answered_prompts(tmp_path: Path, suffix: str):
    rows = [{"text": TEXT}, CHAT, {"text": 'two\r\nlines, "quoted"'}]
    train = read(stored(tmp_path / f"a.{suffix}", WRITERS[suffix](rows)), kind="answers").train
    assert [(len(item.prompt), item.chosen) for item in train] == [(0, TEXT), (1, "b"), (0, rows[2]["text"])]
    only = read(stored(tmp_path / f"b.{suffix}", WRITERS[suffix]([rows[0]])), kind="answers").train
    assert [item.chosen for item in only] == [TEXT]


def test_a_table_names_what_it_could_hold(tmp_path: Path):
    path = stored(tmp_path / "a.csv", as_csv([{"texts": "a"}]))
    with pytest.raises(Refusal, match="line 1: the header has 'texts', and needs .* messages, or text"):
        read(path, kind="answers")


def test_texts_are_held_out_by_their_text():
    every = [Example((), f"text {number % 10}", None, f"row {number}") for number in range(40)]
    train, valid = split_off(every, 0.25, seed=1)
    assert len(valid) == 8
    assert not {item.chosen for item in train} & {item.chosen for item in valid}
    held = {item.chosen for item in valid}
    assert {item.chosen for item in split_off(every[::-1], 0.25, seed=1)[1]} == held


def tokenizer_of(folder: Path, template: str = "", *, text: str = "$A", swallowed: str = "", **more: Any) -> Any:
    """A tokenizer that wraps text as `text` says and drops the characters `swallowed`."""
    folder.mkdir(exist_ok=True)
    tiny.write_tokenizer(folder, template)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"} | more
    if not template:
        del settings["chat_template"]
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    made = tiny.tokenizer()
    special = [("<|endoftext|>", BOS), ("<|im_end|>", EOS)]
    made.post_processor = TemplateProcessing(single=text, special_tokens=special)
    if swallowed:
        made.normalizer = normalizers.Replace(swallowed, "")
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def texts(*every: str) -> list[Example]:
    return [Example((), text, None, f"row {number}") for number, text in enumerate(every, start=1)]


def whole(item: TokenisedPair) -> list[int]:
    return [*item.prompt, *item.chosen]


@pytest.mark.parametrize("frame", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|im_end|>", "$A <|im_end|>"])
@pytest.mark.parametrize("text", [TEXT, "a", "a<|im_end|>", "<|endoftext|>a"])
def test_tokens_are_those_of_mlx_lm(tmp_path: Path, frame: str, text: str):
    tokenizer = tokenizer_of(tmp_path, text=frame)
    (item,) = tokenise(texts(text), tokenizer, None).items
    assert whole(item) == TextDataset([], tokenizer).process({"text": text})[0]
    assert (len(item.prompt), item.rejected, item.source) == (1, [], "row 1")
    assert whole(item).count(EOS) == max(1, tokenizer.encode(text).count(EOS))
    assert item.chosen[-1] == EOS


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    """The tokenizer of a base model: BOS before each text, and no chat template."""
    return tokenizer_of(tmp_path_factory.mktemp("bare"), text="<|endoftext|> $A")


@pytest.mark.parametrize("max_length", [2, 3, 8, 29, 10_000])
def test_a_long_text_is_parted_so_that_every_token_is_predicted_once(bare: TokenizerWrapper, max_length: int):
    every = texts(TEXT * 3, "a", TEXT)
    items, cut = tokenise(every, bare, max_length)
    assert cut == CutCounts()
    assert all(item.chosen and len(whole(item)) <= max_length for item in items)
    for example_, (alone,) in zip(every, [tokenise([one], bare, None).items for one in every], strict=True):
        pieces = [item for item in items if item.source == example_.source]
        assert pieces[0].prompt == alone.prompt == [BOS]
        assert [token for piece in pieces for token in piece.chosen] == alone.chosen
        assert [piece.prompt for piece in pieces[1:]] == [piece.chosen[-1:] for piece in pieces[:-1]]
        assert all(len(whole(piece)) == max_length for piece in pieces[:-1])
    assert [item.source for item in items] == sorted(item.source for item in items)


def test_a_text_of_exactly_the_length_stays_whole(bare: TokenizerWrapper):
    (alone,) = tokenise(texts(TEXT), bare, None).items
    length = len(whole(alone))
    assert tokenise(texts(TEXT), bare, length).items == [alone]
    first, second = tokenise(texts(TEXT), bare, length - 1).items
    assert (len(whole(first)), second.prompt, second.chosen) == (length - 1, alone.chosen[-2:-1], [EOS])


def test_a_length_for_no_two_tokens_is_refused(bare: TokenizerWrapper):
    with pytest.raises(Refusal, match="^row 1: --max-length 1 leaves no room for a token and the next"):
        tokenise(texts(TEXT), bare, 1)


def test_a_chat_template_is_asked_for_only_where_a_row_needs_one(bare: TokenizerWrapper, tmp_path: Path):
    chat = example(CHAT, "row 2", kind="answers")
    assert isinstance(chat, Example)
    with pytest.raises(Refusal, match="^The model's tokenizer has no chat template"):
        tokenise([*texts(TEXT), chat], bare, None)
    both = tokenizer_of(tmp_path, tiny.CHATML)
    items, _ = tokenise([*texts(TEXT), chat, *texts("a")], both, 30)
    alone = [tokenise([one], both, 30).items for one in (*texts(TEXT), chat, *texts("a"))]
    assert items == [item for found in alone for item in found]


@pytest.mark.parametrize("frame", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|im_end|>"])
def test_a_text_that_the_tokenizer_swallows_is_refused_by_row(tmp_path: Path, frame: str):
    tokenizer = tokenizer_of(tmp_path, text=frame, swallowed="z")
    with pytest.raises(Refusal, match="^row 2: text has no token of its own"):
        tokenise(texts("za", "zz"), tokenizer, None)
    if frame == "$A":
        with pytest.raises(Refusal, match="^row 1: text has no token of its own"):
            tokenise(texts("<|im_end|>"), tokenizer, None)


def test_a_tokenizer_without_an_end_of_text_is_said_once(tmp_path: Path):
    tokenizer = tokenizer_of(tmp_path, eos_token=None)
    with pytest.raises(Refusal, match="^The model's tokenizer names no eos_token"):
        tokenise(texts("a", "b"), tokenizer, None)
