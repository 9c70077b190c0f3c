"""Answers to all questions, system by system, kept on disk as they come."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.align.events import Note, Phase
from mlx_dpo.align.record import base_hashes
from mlx_dpo.data.asked import Asked, hash_of, read_asked
from mlx_dpo.data.audit.copies import same
from mlx_dpo.data.templates import instructed, prompt_ids
from mlx_dpo.evaluation import endpoint
from mlx_dpo.evaluation.options import BASE, PROMPTED, EvaluateOptions, named, parted
from mlx_dpo.journal import Journal
from mlx_dpo.models.adapters import WEIGHTS, load_adapter, switched_off
from mlx_dpo.models.answers import greedy_answers
from mlx_dpo.models.load import Loaded, load_to_compute
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import sha256_of

_SUPPORTIVE = Path(__file__).with_name("supportive.txt")


class System(NamedTuple):
    """Who answers: a model, with an adapter or a system prompt; a file of answers; or an endpoint, by its URL."""

    name: str
    model: Path | None = None
    adapter: Path | None = None
    prompt: str | None = None
    file: Path | None = None
    url: str | None = None


def systems(options: EvaluateOptions) -> list[System]:
    """All systems of an evaluation: the base, the prompted base, adapters, other models, files of answers."""
    file = options.system_prompt or _SUPPORTIVE
    try:
        prompt = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        raise Refusal(f"--system-prompt {file} cannot be read as UTF-8 text: give a text file.") from None
    found = [System(BASE, options.model), System(PROMPTED, options.model, prompt=prompt)]
    found += [System(name, options.model, adapter=path) for name, path in named("adapter", options.adapter)]
    found += [System(name, path) for name, path in named("also", options.also)]
    found += [System(name, url=url) for name, url in parted("endpoint", options.endpoint)]
    return found + [System(name, file=path) for name, path in named("answers", options.answers)]


def answered(asked: Sequence[Asked], options: EvaluateOptions) -> Iterator[Any]:
    """Return every system's answers by its name, answers that are on disk already and the others made now.

    Yields Phases. Raises Refusal for answers on disk to other questions or of another system of the same name.
    """
    found: dict[str, list[str]] = {}
    loaded: dict[Path, Loaded] = {}
    hashes: dict[Path | None, list[str] | None] = {None: None}  # of weights, which several systems share
    for system in systems(options):
        if system.file is not None:
            found[system.name] = _from_file(system.file, asked)
            continue
        if system.model is not None and system.model not in hashes:
            hashes[system.model] = sorted(base_hashes(system.model).values())
        identity = {"system": system.name, "model": hashes[system.model]} | _identity(system, asked, options)
        kept = Journal(options.out / "answers" / f"{system.name}.jsonl", identity)
        if len(kept.rows) < len(asked) and system.url is not None:
            yield from _fetched(system.name, system.url, asked, kept, options)
        elif len(kept.rows) < len(asked) and system.model is not None:
            if system.model not in loaded:
                yield Note(f"Loading {system.model}")
                loaded.clear()  # one model at a time in memory
                loaded[system.model] = load_to_compute(system.model)
            yield from _made(system, loaded[system.model], asked, kept, options)
        found[system.name] = [row["answer"] for row in kept.rows]
    return found


def _made(
    system: System, loaded: Loaded, asked: Sequence[Asked], kept: Journal, options: EvaluateOptions
) -> Iterator[Phase]:
    """Answer what has no answer yet, in batches that are the same however often this was stopped."""
    if system.adapter is not None:
        load_adapter(loaded.model, system.adapter)
    size, name = options.batch_size, f"Answering: {system.name}"
    told = system.prompt
    turns = [question.prompt if told is None else instructed(question.prompt, told) for question in asked]
    prompts = [prompt_ids(loaded.tokenizer, each) for each in turns]
    kept.cut_to(len(kept.rows) // size * size)  # always the same batches
    yield Phase(name, len(kept.rows), len(asked))
    for first in range(len(kept.rows), len(asked), size):
        made = greedy_answers(loaded, prompts[first : first + size], options.max_tokens)
        kept.add([{"answer": answer.text.removesuffix(" …")} for answer in made])
        yield Phase(name, len(kept.rows), len(asked))
    if system.adapter is not None:
        _without_adapter(loaded)


def _fetched(
    name: str, url: str, asked: Sequence[Asked], kept: Journal, options: EvaluateOptions
) -> Iterator[Phase | Note]:
    """Ask an endpoint for what it has not answered yet, one question at a time."""
    yield Note(f"The questions go to {url}")
    for question in asked[len(kept.rows) :]:
        yield Phase(f"Asking: {name}", len(kept.rows), len(asked))
        text = endpoint.answer(url, options.endpoint_model, question.prompt, options.max_tokens)
        kept.add([{"answer": text}])
    yield Phase(f"Asking: {name}", len(kept.rows), len(asked))


def _without_adapter(loaded: Loaded) -> None:
    with switched_off(loaded.model):
        base = loaded.model.leaf_modules()
    loaded.model.update_modules(base)
    mx.clear_cache()


def _identity(system: System, asked: Sequence[Asked], options: EvaluateOptions) -> dict[str, Any]:
    adapter = None if system.adapter is None else system.adapter / WEIGHTS
    return {
        "adapter": sha256_of(adapter) if adapter and adapter.exists() else None,
        "system prompt": system.prompt,
        "endpoint": system.url and f"{system.url} ({options.endpoint_model})",
        "questions": hash_of([question.prompt for question in asked]),
        "--max-tokens": options.max_tokens,
        "--batch-size": options.batch_size,
    }


def _from_file(file: Path, asked: Sequence[Asked]) -> list[str]:
    """The answers of a file to the questions, found by their words."""
    given = {same(row.question): row.reference for row in read_asked(file)}
    found = []
    for question in asked:
        answer = given.get(same(question.question))
        if answer is None:
            raise Refusal(f"{file} has no answer to the question of {question.source}: add it, or use --limit.")
        found.append(answer)
    return found
