"""The examples of a run: read, split and tokenised before the model is loaded."""

import hashlib
from typing import Any, NamedTuple

from mlx_dpo.align.demands import loss_of
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.data.examples import Example, Kind, Turns
from mlx_dpo.data.questions import read_questions
from mlx_dpo.data.reading import fingerprint, read, split_off
from mlx_dpo.data.templates import prompt_ids
from mlx_dpo.data.tokenised import CutCounts, TokenisedPair, tokenise
from mlx_dpo.models.load import read_tokenizer
from mlx_dpo.refusal import Refusal

_MANY, _HOLDOUT = 100, 0.1  # from so many rows on, this share can be spared for an honest look


class Prepared(NamedTuple):
    """Tokenised examples, the prompts to answer before and after, what was cut, and the data's hash.

    `asked` are the questions' token ids; `origin` are hashes of both kinds of examples and of the questions. `unseen`
    says whether the questions are other than the prompts that are trained on; `holdout` is the share that was
    held out, 0 where a valid file or nothing was.
    """

    train: list[TokenisedPair]
    valid: list[TokenisedPair]
    questions: list[Turns]
    asked: list[list[int]]
    unseen: bool
    cut: CutCounts
    fingerprint: str
    origin: tuple[str, str, str]
    holdout: float


def prepared(options: TrainOptions, config: dict[str, Any]) -> Prepared:
    """Read and tokenise the data of a run; `config` is the model's.

    Raises Refusal, naming file and row, for anything that could not be learnt as it stands.
    """
    train, valid, holdout = _split(options)
    if options.method == "sft":
        train = [example._replace(rejected=None) for example in train]
        valid = [example._replace(rejected=None) for example in valid]
    tokenizer = read_tokenizer(options.model, config)
    learnt = tokenise(train, tokenizer, options.max_length)
    held_out = tokenise(valid, tokenizer, options.max_length)
    _refuse_foreign_tokens(learnt.items + held_out.items, config)
    cut = CutCounts(*(a + b for a, b in zip(learnt.cut, held_out.cut, strict=True)))
    questions, unseen = _questions(options, train, valid)
    _refuse_idle(options, train, valid, questions)
    return Prepared(
        train=learnt.items,
        valid=held_out.items,
        questions=questions,
        asked=[prompt_ids(tokenizer, question) for question in questions],
        unseen=unseen,
        cut=cut,
        fingerprint=fingerprint(train),
        origin=(fingerprint(train), fingerprint(valid), hashlib.sha256(str(questions).encode()).hexdigest()),
        holdout=holdout,
    )


def _questions(options: TrainOptions, train: list[Example], valid: list[Example]) -> tuple[list[Turns], bool]:
    """The first different prompts to answer, and whether none of them is trained on."""
    if options.questions is not None:
        prompts = read_questions(options.questions)
    else:
        prompts = [example.prompt for example in valid or train if example.prompt]  # plain text asks nothing
    distinct = {str(prompt): prompt for prompt in reversed(prompts)}
    first = list(distinct.values())[::-1][: options.samples]
    trained = {str(example.prompt) for example in train}
    return first, all(str(prompt) not in trained for prompt in first)


def _kind(options: TrainOptions) -> Kind:
    if options.method == "sft":
        return "answers"
    return "thumbs" if loss_of(options).is_unpaired else "pairs"


def _split(options: TrainOptions) -> tuple[list[Example], list[Example], float]:
    splits = read(options.data, kind=_kind(options))
    if options.holdout and splits.valid:
        raise Refusal(f"--holdout is given, but {options.data} has a valid file: leave one of them away.")
    few = splits.valid or len(splits.train) < _MANY
    share = options.holdout if options.holdout is not None else 0.0 if few else _HOLDOUT
    if not share:
        return splits.train, splits.valid, 0.0
    train, valid = split_off(splits.train, share, options.seed)
    if train and valid:
        return train, valid, share
    if options.holdout is None:
        return splits.train, [], 0.0
    raise Refusal(f"--holdout {share:g} of {options.data} leaves one side empty: give another share.")


def _refuse_idle(options: TrainOptions, train: list[Example], valid: list[Example], questions: list[Turns]) -> None:
    """Raise Refusal where an option asks for what the data do not hold."""
    if (options.keep == "best" or options.patience) and not valid:
        raise Refusal(
            f"{options.data} has no held-out examples to choose the best step by: add --holdout, or leave --keep and "
            "--patience away."
        )
    if options.eval_every and not valid and not questions:
        raise Refusal("--eval-every has nothing to look at: hold examples out (--holdout), or leave it away.")
    if options.best_by == "chosen" and not any(example.chosen for example in valid):
        raise Refusal(f"--best-by chosen: none of the examples held out of {options.data} is a chosen answer.")
    if not loss_of(options).is_unpaired or options.method == "sft":
        return
    if options.on_displacement != "warn" and not any(example.chosen for example in train):
        raise Refusal(f"--on-displacement {options.on_displacement}: {options.data} has no thumbs up that could fall.")
    if 1 in (len(train), len(valid)):
        few = "learn" if len(train) == 1 else "hold out"
        raise Refusal(f"--loss kto measures an answer against others: {few} two answers of {options.data} or more.")


def _refuse_foreign_tokens(pairs: list[TokenisedPair], config: dict[str, Any]) -> None:
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    for pair in pairs:
        highest = max(*pair.prompt, *pair.chosen, *pair.rejected)
        if size and highest >= size:
            raise Refusal(
                f"{pair.source} has the token {highest}, but the model knows {size}: the tokenizer in the model's "
                "folder belongs to another model."
            )
