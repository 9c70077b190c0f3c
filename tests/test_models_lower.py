"""What lies below the adapters: kept to the bit in a file that nobody finds, and a model left as it was."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import runs

from mlx_dpo.models import adapters, lower
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded, blocks, load
from mlx_dpo.models.lower import Kept
from mlx_dpo.models.rows import Said

Folder = Callable[[str], Path]
TOKENS = mx.array([[5, 6, 7, 8, 9]])


Keeper = Callable[..., Kept]


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """Makes memories below a folder of the test's own, which are closed with it."""
    made: list[Kept] = []

    def kept(limit: float = 1e9, folder: Path = tmp_path) -> Kept:
        made.append(Kept(folder, limit))
        return made[-1]

    yield kept
    for memory in made:
        memory.file.close()


def states(seed: int, tokens: int = 7, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((tokens, 24), key=mx.random.key(seed)).astype(dtype)


def same(one: mx.array | None, other: mx.array) -> bool:
    return one is not None and one.dtype == other.dtype and bool(mx.array_equal(one, other).item())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_what_is_kept_comes_back_to_the_bit(keeper: Keeper, dtype: mx.Dtype):
    kept = keeper()
    whole = [states(seed, 1 + seed, dtype) for seed in range(9)]
    for seed, value in enumerate(whole):
        kept.put(bytes([seed]), value)
    assert all(same(kept.get(bytes([seed])), value) for seed, value in reversed(list(enumerate(whole))))
    assert kept.get(b"another") is None


def test_parts_of_larger_arrays_come_back_too(keeper: Keeper):
    kept, whole = keeper(), mx.random.normal((3, 11, 24), key=mx.random.key(0))
    kept.put(b"rows", whole[1, 2:9])
    kept.put(b"turned", whole[0].T)
    assert same(kept.get(b"rows"), whole[1, 2:9])
    assert same(kept.get(b"turned"), whole[0].T)


def test_no_states_at_all_come_back_too(keeper: Keeper):
    # What an answer of a single token has, as the last token predicts nothing.
    kept = keeper()
    kept.put(b"none", states(0)[:0])
    assert same(kept.get(b"none"), states(0)[:0])


def test_a_name_keeps_what_it_was_first_given(keeper: Keeper):
    kept = keeper()
    kept.put(b"name", states(1))
    kept.put(b"name", states(2))
    assert same(kept.get(b"name"), states(1))


def test_no_more_than_the_limit_is_kept(keeper: Keeper):
    kept = keeper(2.5 * states(0).nbytes)
    for seed in range(4):
        kept.put(bytes([seed]), states(seed))
    kept.put(b"small", states(9, 3))
    assert [kept.get(bytes([seed])) is not None for seed in range(4)] == [True, True, False, False]
    assert same(kept.get(b"small"), states(9, 3))
    assert os.fstat(kept.file.fileno()).st_size <= 2.5 * states(0).nbytes


def test_the_file_has_no_name(tmp_path: Path, keeper: Keeper):
    kept = keeper(folder=tmp_path / "cache")
    kept.put(b"name", states(1))
    assert os.fstat(kept.file.fileno()).st_size == states(1).nbytes
    assert list((tmp_path / "cache").iterdir()) == []
    kept.file.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_ends_the_keeping_and_not_the_run(keeper: Keeper, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    kept = keeper()
    kept.put(b"early", states(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        kept.put(b"late", states(2))
    kept.put(b"later", states(3))
    assert kept.get(b"late") is None
    assert kept.get(b"later") is None
    assert same(kept.get(b"early"), states(1))


def test_what_the_disk_took_in_part_is_not_kept(keeper: Keeper):
    kept, size = keeper(), states(1).nbytes
    kept.put(b"early", states(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, before[1]))  # the write after is a short one
    try:
        kept.put(b"late", states(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept.put(b"later", states(3))  # there is room again
    assert same(kept.get(b"early"), states(1))
    for name, value in ((b"late", states(2)), (b"later", states(3))):
        found = kept.get(name)
        assert found is None or same(found, value)


def with_adapter(folder: Path, keys: tuple[str, ...], layers: int) -> Loaded:
    loaded = load(folder)
    adapters.attach(loaded.model, adapters.AdapterShape(4, 2.0, 0.0, keys, layers), seed=1)
    return loaded


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_below_adapters_on_the_top_blocks_lie_the_others(tiny_folder: Folder, top: int):
    assert lower.depth_below(runs.adapted(tiny_folder("gemma3_text"), layers=top).model) == 4 - top


@pytest.mark.parametrize(
    ("targets", "depth"),
    [
        (("model.layers.2.mlp.up_proj",), 2),
        (("model.layers.3.self_attn.q_proj", "model.layers.1.mlp.down_proj"), 1),
        (("model.layers.0.self_attn.v_proj",), 0),
        (("model.layers.3.self_attn.q_proj", "model.embed_tokens"), 0),
    ],
    ids=["one", "two", "the lowest", "beside the embedding"],
)
def test_single_layers_by_whole_path(tiny_folder: Folder, targets: tuple[str, ...], depth: int):
    assert lower.depth_below(with_adapter(tiny_folder("gemma3_text"), targets, 4).model) == depth


@pytest.mark.parametrize("key", ["lm_head", "model.embed_tokens"])
def test_nothing_lies_below_an_adapter_outside_of_the_blocks(tiny_folder: Folder, key: str):
    assert lower.depth_below(with_adapter(tiny_folder("mistral"), (key,), 1).model) == 0


def test_nothing_lies_below_no_adapter(tiny_folder: Folder):
    assert lower.depth_below(load(tiny_folder("gemma3_text")).model) == 0


def broken_into(way: Any) -> None:
    with pytest.raises(KeyError), way:
        raise KeyError


def test_a_model_is_as_it_was_afterwards_errors_included(tiny_folder: Folder):
    model = runs.adapted(tiny_folder("gemma3_text"), layers=1, seed=3).model
    kinds, plain = [type(block) for block in blocks(model)], model(TOKENS)
    with lower.handing_on(model, 3, mx.zeros((1, 5, 64))):
        assert not mx.allclose(model(TOKENS), plain)
    with lower.Reaching(model, 3) as reaching:
        model(TOKENS)
    assert reaching.states[0].shape == (1, 5, 64)
    for way in (lower.handing_on(model, 3, mx.zeros((1, 5, 64))), lower.Reaching(model, 3)):
        broken_into(way)
    assert [type(block) for block in blocks(model)] == kinds
    assert mx.array_equal(model(TOKENS), plain)


def test_what_was_reached_and_handed_on_gives_the_whole_model(tiny_folder: Folder):
    model = runs.adapted(tiny_folder("gemma3_text"), layers=2, seed=3).model
    with lower.Reaching(model, 2) as reaching:
        model(TOKENS)
    (found,) = reaching.states
    with lower.handing_on(model, 2, found):
        assert mx.array_equal(model(TOKENS), runs.adapted(tiny_folder("gemma3_text"), layers=2, seed=3).model(TOKENS))


@pytest.mark.parametrize(
    "texts", [[Said([5, 6, 7], [8]), Said([5, 6, 7], [9, 4, 2])], [Said([5], [6]), Said([7], [8, 9])]]
)
def test_answers_of_one_token_are_kept_like_others(tiny_folder: Folder, keeper: Keeper, texts: list[Said]):
    loaded = runs.adapted(tiny_folder("gemma3_text"), layers=1, seed=3)
    plain = Forward.plain(loaded.model)
    forward = Forward.of(loaded.model).keeping(keeper())
    assert forward.depth == 3
    expected = plain.token_logps(plain.rows_of(texts))
    for _ in range(4):  # known in part, and then as a whole
        assert mx.allclose(forward.token_logps(forward.rows_of(texts)), expected, rtol=1e-5, atol=1e-5)
        alone = forward.token_logps(forward.rows_of(texts[:1]))
        assert mx.allclose(alone, expected[:, :1], rtol=1e-5, atol=1e-5)
