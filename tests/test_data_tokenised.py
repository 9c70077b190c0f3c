"""Tokens are those that TRL makes, whatever the neighbours; what does not fit is cut in the open."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers.processors import TemplateProcessing

from mlx_dpo.data.examples import Example, example
from mlx_dpo.data.reading import read
from mlx_dpo.data.templates import Message, prompt_ids
from mlx_dpo.data.tokenised import CutCounts, TokenisedPair, tokenise
from mlx_dpo.refusal import Refusal

GOLDEN = json.loads((Path(__file__).parent / "goldens/tokenised.json").read_text(encoding="utf-8"))
TRIMMING = tiny.CHATML.replace("message['content']", "message['content'] | trim('z') | trim")
MAKE = Callable[[str], TokenizerWrapper]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> MAKE:
    def made(template: str = tiny.CHATML) -> TokenizerWrapper:
        folder = tmp_path_factory.mktemp("tokenizer")
        tiny.write_tokenizer(folder, template)
        return load_tokenizer(folder)

    return made


def examples_of(rows: list[dict[str, Any]]) -> list[Example]:
    made = [
        example(row, f"row {number}", kind="pairs" if "rejected" in row else "answers")
        for number, row in enumerate(rows, start=1)
    ]
    assert all(isinstance(item, Example) for item in made), made
    return [item for item in made if isinstance(item, Example)]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_tokens_are_those_of_trl(tokenizer_of: MAKE, case: dict[str, Any]):
    items = tokenise(examples_of(case["rows"]), tokenizer_of(case["template"]), None).items
    assert [(item.prompt, item.chosen, item.rejected) for item in items] == [
        (ids["prompt"], ids["chosen"], ids["rejected"]) for ids in case["tokens"]
    ]


def test_tokens_do_not_depend_on_the_neighbours(tokenizer_of: MAKE):
    tokenizer = tokenizer_of(tiny.CHATML)
    rows = examples_of(GOLDEN["cases"][0]["rows"])
    alone = [tokenise([row], tokenizer, 40).items[0] for row in rows]
    assert tokenise(rows[::-1], tokenizer, 40).items == alone[::-1]


def test_one_bos_and_one_end_of_turn(tokenizer_of: MAKE, tmp_path: Path):
    made = tiny.tokenizer()
    tiny.write_tokenizer(tmp_path, "{{ bos_token }}" + tiny.CHATML)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    made.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a")[0] == 0
    (item,) = tokenise(examples_of([{"prompt": "a", "chosen": "b", "rejected": "c"}]), tokenizer, None).items
    assert item.prompt[0] == 0
    assert (item.prompt + item.chosen).count(0) == 1
    assert item.chosen.count(2) == 1


def test_without_a_second_answer_it_is_empty(tokenizer_of: MAKE):
    rows = [{"prompt": "a", "chosen": "b"}]
    (item,) = tokenise(examples_of(rows), tokenizer_of(tiny.CHATML), 512).items
    assert item.rejected == []
    assert tokenizer_of(tiny.CHATML).decode(item.chosen) == "b<|im_end|>\n"


@pytest.mark.parametrize("opening", ["assistant: ", "assistant: <pad>"])
def test_every_row_where_the_template_does_not_extend_the_prompt_is_named(tokenizer_of: MAKE, opening: str):
    template = tiny.CHATML.replace("assistant\n'", opening + "'").replace("'\n'", "': '")
    rows = [{"prompt": "a", "chosen": "a day", "rejected": "c"}, {"prompt": "b", "chosen": "c", "rejected": "e"}]
    with pytest.raises(Refusal) as caught:
        tokenise(examples_of(rows), tokenizer_of(template), None)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["2 things are wrong", "row 1", "row 2"]
    assert "chosen does not continue the prompt token for token (they part at token" in lines[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "zz", "rejected": "b"}, "row 1: chosen has no token of its own"),
        ({"prompt": "a", "chosen": "b", "rejected": "zz"}, "row 1: rejected has no token of its own"),
        ({"prompt": "a", "completion": "z"}, "row 1: chosen has no token of its own"),
        ({"prompt": "a", "chosen": "b ", "rejected": "b"}, "row 1: chosen and rejected are the same tokens"),
    ],
)
def test_an_answer_that_the_template_swallows_is_refused(tokenizer_of: MAKE, row: dict[str, str], reason: str):
    with pytest.raises(Refusal, match=reason):
        tokenise(examples_of([row]), tokenizer_of(TRIMMING), None)


def test_a_template_that_fails_names_the_row(tokenizer_of: MAKE):
    template = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + tiny.CHATML
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": turns, "chosen": "b", "rejected": "c"}]
    with pytest.raises(Refusal, match="^row 2: .*too many"):
        tokenise(examples_of(rows), tokenizer_of(template), None)


def test_a_tokenizer_without_a_template_is_said_once(tmp_path: Path):
    tiny.write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    with pytest.raises(Refusal, match="^The model's tokenizer has no chat template"):
        tokenise(examples_of(rows), load_tokenizer(tmp_path), None)


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "He fell in the bathroom. " * 5},
    {"role": "assistant", "content": "Is he hurt?"},
    {"role": "user", "content": "No, he is tired. " * 5},
]
ROW = {
    "prompt": TALK,
    "chosen": "Stay with him tonight.",
    "rejected": "Redirect the patient to an activity now, and rest.",
}


def whole_and_cut(
    tokenizer: TokenizerWrapper, max_length: int, row: dict[str, Any] = ROW
) -> tuple[TokenisedPair, TokenisedPair, CutCounts]:
    rows = examples_of([row])
    items, cut = tokenise(rows, tokenizer, max_length)
    return tokenise(rows, tokenizer, None).items[0], items[0], cut


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("spare", [1, 7, 60])
def test_a_prompt_gives_way_from_its_left_after_the_system_turn(tokenizer_of: MAKE, case: dict[str, Any], spare: int):
    tokenizer = tokenizer_of(case["template"])
    whole, *_ = whole_and_cut(tokenizer, 10_000)
    longest = max(len(whole.chosen), len(whole.rejected))
    limit = len(whole.prompt) + longest - spare
    _, item, cut = whole_and_cut(tokenizer, limit)
    opening = tokenizer.encode(
        tokenizer.apply_chat_template([TALK[0], {"role": "user", "content": "§"}], tokenize=False).split("§")[0],
        add_special_tokens=False,
    )
    assert len(item.prompt) + longest == limit
    assert item.prompt == opening + whole.prompt[len(opening) + spare :]
    assert (item.chosen, item.rejected) == (whole.chosen, whole.rejected)
    assert cut == CutCounts(pairs=1, prompts=1, responses=0, tokens=spare)


def test_nothing_is_cut_at_exactly_the_length(tokenizer_of: MAKE):
    tokenizer = tokenizer_of(tiny.CHATML)
    whole, *_ = whole_and_cut(tokenizer, 10_000)
    _, item, cut = whole_and_cut(tokenizer, len(whole.prompt) + len(whole.rejected))
    assert item == whole
    assert cut == CutCounts()


def test_answers_lose_their_end_only_when_the_prompt_has_nothing_left(tokenizer_of: MAKE):
    tokenizer = tokenizer_of(tiny.CHATML)
    whole, *_ = whole_and_cut(tokenizer, 10_000)
    bare = [Message(role="system", content="Be kind."), Message(role="user", content="§")]
    frame = [i for i in prompt_ids(tokenizer, bare) if i not in tokenizer.encode("§", add_special_tokens=False)]
    limit = len(frame) + len(whole.chosen) + 2
    assert len(whole.rejected) > len(whole.chosen) + 2
    _, item, cut = whole_and_cut(tokenizer, limit)
    assert item.prompt == frame
    assert item.chosen == whole.chosen
    assert item.rejected == whole.rejected[: len(whole.chosen) + 2]
    lost = len(whole.prompt) - len(frame) + len(whole.rejected) - len(item.rejected)
    assert cut == CutCounts(pairs=1, prompts=1, responses=1, tokens=lost)


def test_cuts_add_up_over_the_pairs(tokenizer_of: MAKE):
    tokenizer = tokenizer_of(tiny.CHATML)
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    _, _, one = whole_and_cut(tokenizer, 60)
    items, cut = tokenise(examples_of([ROW, short, ROW]), tokenizer, 60)
    assert cut == CutCounts(*(2 * count for count in one))
    assert [item.source for item in items] == ["row 1", "row 2", "row 3"]


def test_a_length_without_room_is_refused_by_row(tokenizer_of: MAKE):
    tokenizer = tokenizer_of(tiny.CHATML)
    with pytest.raises(Refusal, match="^row 1: --max-length 5 leaves no room for an answer: .* take [0-9]+ tokens"):
        whole_and_cut(tokenizer, 5)
    alike = {"prompt": "a", "chosen": "so it is all right", "rejected": "so it is a symptom"}
    whole, *_ = whole_and_cut(tokenizer, 10_000, alike)
    with pytest.raises(Refusal, match="^row 1: --max-length [0-9]+ cuts chosen and rejected to the same tokens"):
        whole_and_cut(tokenizer, len(whole.prompt) + 1, alike)


HERS = Path(__file__).parents[2] / "shared/data/empathy-by-design/pairs.jsonl"


@pytest.mark.skipif(not HERS.exists(), reason="the paper's pairs are not here")
def test_the_papers_pairs_tokenise_whole(tokenizer_of: MAKE):
    items, cut = tokenise(read(HERS, kind="pairs").train, tokenizer_of(tiny.CHATML), None)
    assert len(items) == 909
    assert cut == CutCounts()
