"""The cache says the truth: what is reused gives the same logits as a fresh prefill."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models import mamba
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from mlx_dpo.chat import speech
from mlx_dpo.chat.cache import TrackedCache
from mlx_dpo.chat.engine import Answer, Conversation
from mlx_dpo.chat.options import Sampling
from mlx_dpo.models.load import Loaded, load, on_cpu

FAMILIES = ["llama", "llama-untied", "mistral", "qwen3", "gemma3_text", "gemma3"]
QUESTIONS = [
    "My mother asks the same question again and again.",
    "What can I say to her tonight?",
    "He fell in the bathroom at 3 am.",
    "I am tired.",
]
Folder = Callable[[str], Path]
# On a GPU one token at a time and a whole prompt go through different kernels, some of them in TF32.
TOLERANCE = 1e-4 if on_cpu() else 5e-3


def logits(model, cache: list, ids: list[int]) -> mx.array:
    return model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)


def fresh(model, ids: list[int]) -> mx.array:
    return logits(model, make_prompt_cache(model), ids)


def assert_true(model, cache: TrackedCache, ids: list[int]) -> int:
    """The next-token logits after `ids` through a copy of the cache are those of a fresh prefill."""
    held = TrackedCache(model)
    held.layers, held.tokens = copy.deepcopy(cache.layers), list(cache.tokens)
    reuse = held.reuse(ids)
    given = logits(model, held.layers, ids[reuse.tokens :])
    assert mx.allclose(given, fresh(model, ids), rtol=TOLERANCE, atol=TOLERANCE).item()
    return reuse.tokens


def conversation(folder: Path, **sampling) -> tuple[Loaded, Conversation]:
    loaded = load(folder)
    return loaded, Conversation(loaded, Sampling(**({"max_tokens": 12, "seed": 1} | sampling)), "Be kind.")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_has_the_logits_of_a_fresh_prefill(tiny_folder: Folder, family: str):
    loaded, talk = conversation(tiny_folder(family))
    reused = []
    for question in QUESTIONS:
        reused.append(assert_true(loaded.model, talk.cache, talk.prompt(question)))
        talk.answer(question)
        assert_true(loaded.model, talk.cache, [*talk.cache.tokens, 7])
    assert len(talk.cache.tokens) > 4 * 24  # far beyond the sliding windows
    assert reused[0] == 0
    assert "gemma" in family or min(reused[1:]) >= 19  # the system prompt, at least


def test_a_template_that_writes_history_otherwise_than_the_prompt_leaves_the_cache_true(tmp_path: Path):
    folder = tiny.write_model(tmp_path / "m")
    # As Qwen3's does, with its empty thoughts before the answer in work and before no other.
    tiny.write_tokenizer(folder, tiny.CHATML.replace("assistant\n'", "assistant\nThink: no.\n'"))
    loaded, talk = conversation(folder)
    for question in QUESTIONS:
        ids = talk.prompt(question)
        assert loaded.tokenizer.decode(ids).count("Think") == 1
        reused = assert_true(loaded.model, talk.cache, ids)
        assert reused < max(1, len(talk.cache.tokens))
        talk.answer(question)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_cuts_turns_short_or_changes_them_leaves_the_cache_true(tiny_folder: Folder, family: str):
    loaded, talk = conversation(tiny_folder(family), max_tokens=40)

    def check() -> None:
        assert_true(loaded.model, talk.cache, [*talk.cache.tokens, 7])
        assert_true(loaded.model, talk.cache, talk.prompt("And now?"))

    stopped = talk.ask(QUESTIONS[0])
    next(stopped)
    talk.stop()
    *_, answer = stopped
    assert isinstance(answer, Answer)
    assert answer.finish_reason == "interrupted"
    assert talk.turns[-1].answer == answer.text
    check()
    left = talk.ask(QUESTIONS[1])
    first = next(left)
    left.close()
    assert talk.turns[-1] == (QUESTIONS[1], first)
    check()
    list(talk.regenerate())
    assert len(talk.turns) == 2
    check()
    talk.undo()
    check()
    talk.instruct("You are a nurse.")
    check()
    talk.answer(QUESTIONS[2])
    talk.instruct(None)
    check()
    talk.clear()
    check()


class Falls:
    """A layer that fails in the middle of a token, once."""

    def __init__(self, layer, error: BaseException, calls: int) -> None:
        self.layer, self.error, self.calls = layer, error, calls

    def __call__(self, *arguments, **options):
        self.calls -= 1
        if self.calls == 0:
            raise self.error
        return self.layer(*arguments, **options)

    def __getattr__(self, name: str):
        return getattr(self.layer, name)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_interrupt_within_a_token_costs_the_cache_and_nothing_else(tiny_folder: Folder, calls: int):
    loaded, talk = conversation(tiny_folder("llama"))
    talk.answer(QUESTIONS[0])
    model: Any = loaded.model
    layers = model.model.layers
    layers[1] = Falls(whole := layers[1], KeyboardInterrupt(), calls)
    with pytest.raises(KeyboardInterrupt):
        talk.answer(QUESTIONS[1])
    layers[1] = whole
    assert_true(loaded.model, talk.cache, talk.prompt(QUESTIONS[2]))
    assert talk.answer(QUESTIONS[2]).reused_tokens == 0
    assert talk.turns[0].question == QUESTIONS[0]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("hears", [1, 2, 3])
def test_a_long_prompt_can_be_stopped_between_its_chunks(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, family: str, hears: int
):
    monkeypatch.setattr(speech, "PREFILL", 16)
    loaded = load(tiny_folder(family))
    cache = TrackedCache(loaded.model)
    asked = iter([False] * (hears - 1) + [True] * 9)
    voice = speech.Voice(loaded.model, loaded.tokenizer, frozenset(), greedy_sampler)
    ids = list(range(10, 70))
    said = speech.Speech(voice, cache, lambda: next(asked))
    assert list(said.pieces(ids, 5)) == []
    assert said.finish == "interrupted"
    assert cache.tokens == ids[: 16 * (hears - 1)]
    reused = assert_true(loaded.model, cache, [*ids, 7])
    assert reused == len(cache.tokens)


def test_a_wrapped_window_may_grow_but_not_be_cut(tiny_folder: Folder):
    model = load(tiny_folder("gemma3_text")).model
    cache = TrackedCache(model)
    ids = list(range(10, 50))
    logits(model, cache.layers, ids)
    cache.tokens = list(ids)
    longer = [*ids, *range(60, 90)]
    assert assert_true(model, cache, longer) == 40
    assert cache.reuse([*ids[:39], 5]) == (0, True)
    assert cache.tokens == []
    assert_true(model, cache, longer)


def test_a_window_that_has_not_wrapped_is_cut(tiny_folder: Folder):
    model = load(tiny_folder("gemma3_text")).model
    cache = TrackedCache(model)
    ids = list(range(10, 30))
    logits(model, cache.layers, ids)
    cache.tokens = list(ids)
    assert assert_true(model, cache, [*ids[:12], *range(60, 90)]) == 12


def test_a_recurrent_state_may_grow_but_not_be_cut():
    mx.random.seed(0)
    arguments = {"hidden_size": 32, "intermediate_size": 64, "state_size": 8, "num_hidden_layers": 2}
    kernel = {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    model = mamba.Model(mamba.ModelArgs(model_type="mamba", vocab_size=50, **arguments, **kernel))
    cache = TrackedCache(model)
    logits(model, cache.layers, [1, 2, 3, 4])
    cache.tokens = [1, 2, 3, 4]
    assert assert_true(model, cache, [1, 2, 3, 4, 5]) == 4
    assert assert_true(model, cache, [1, 2, 9]) == 0


def test_layers_that_disagree_with_the_tokens_are_not_believed(tiny_folder: Folder):
    model = load(tiny_folder("llama")).model
    cache = TrackedCache(model)
    logits(model, cache.layers, [10, 11, 12])
    cache.tokens = [10, 11]
    assert assert_true(model, cache, [10, 11, 13]) == 0
