"""What held-out examples say of a run: each measure before training, at the first evaluation and at the kept step."""

import html
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mlx_dpo.align import history
from mlx_dpo.align.demands import loss_of
from mlx_dpo.align.history import Row
from mlx_dpo.align.options import TrainOptions

_NONE_HELD_OUT = "No pairs were held out, so nothing here says how well this carries over to new questions."
_BRACKETS = (
    "In brackets stand 95% intervals: other held-out examples of the same kind would probably have given a number in "
    "there. A dash stands where there is no such number."
)

STYLE = """
.outcome td{padding-right:18px}.outcome tr>:first-child{width:40%}.outcome tr>:first-child,.outcome thead th{
white-space:normal}.outcome small{display:block;color:var(--soft);font-weight:400}.outcome i{color:var(--soft);
font-style:normal;white-space:nowrap}.outcome thead th{width:auto;color:var(--soft)}
@media(max-width:640px){.outcome thead{display:none}.outcome tr{display:block;border-bottom:1px solid var(--line);
padding:8px 0}.outcome td,.outcome tbody th{display:block;border:0;padding:2px 0}.outcome tr>:first-child{width:auto}
.outcome td::before{content:attr(data-at) ": ";color:var(--soft)}}
"""

_Writing = Callable[[float], str]
_Value = tuple[float, float | None, float | None]


class _Measure(NamedTuple):
    """A row of the table: what it is, the value of an evaluation with its interval, and the one before training."""

    name: str
    meaning: str
    write: _Writing
    at: Callable[[Row], _Value | None]
    before: float | None = None


def table(options: TrainOptions, rows: Sequence[Row], kept: int) -> str:
    """The held-out numbers as HTML: a sentence, then a row a measure; a sentence alone where nothing is held out."""
    evaluations = history.evaluations(rows)
    if not evaluations:
        return f"<p>{_NONE_HELD_OUT}</p>"
    last = next((row for row in evaluations if row["step"] == kept), evaluations[-1])
    shown = [evaluations[0], last] if evaluations[0] is not last else [last]
    names = [f"First evaluation, step {shown[0]['step']}"] * (len(shown) - 1) + [f"After step {last['step']}"]
    places = ["Before training", *names]
    heads = "".join(f"<th>{place}</th>" for place in places)
    body = "".join(_table_row(measure, shown, places) for measure in _measures(options, last))
    return (
        f'<p>{_in_words(options, last)}</p><p class="lead">{_BRACKETS}</p><table class="outcome">'
        f"<thead><tr><th>Held out</th>{heads}</tr></thead><tbody>{body}</tbody></table>"
    )


def _in_words(options: TrainOptions, row: Row) -> str:
    accuracy, shift = row.get("eval_rewards/accuracies"), row.get("eval_logps/chosen_shift")
    what = "pairs" if accuracy is not None else "answers"
    words = f"The numbers are of {row.get('eval_pairs', 0)} held-out {what}, which were not trained on."
    if accuracy is not None:
        than = " more than it did before training" if loss_of(options).needs_reference else " to the rejected one"
        words += f" In <b>{accuracy:.0%}</b> of them the model prefers the chosen answer{than}."
    if shift is not None:
        words += (
            f" The log-probability of the chosen answers {'rose' if shift >= 0 else 'fell'} by {abs(shift):.1f} nats "
            "on average."
        )
    return words


def _measures(options: TrainOptions, row: Row) -> Iterator[_Measure]:
    """The measures that an evaluation has."""
    loss = loss_of(options)
    every = (
        *_of_preferences(row, loss.needs_reference),
        *_of_answers(row, loss.takes_means),
        _Measure("Loss", "What training minimises; lower is better.", "{:.3f}".format, _logged("eval_loss")),
    )
    return (measure for measure in every if measure.at(row) is not None)


def _of_preferences(row: Row, refers: bool) -> Iterator[_Measure]:
    than = "gained more than the rejected one since before training" if refers else "has the higher reward"
    yield _Measure(
        "Prefers the chosen answer (reward accuracy)",
        f"Share of pairs in which the chosen answer {than}.",
        "{:.0%}".format,
        _logged("eval_rewards/accuracies"),
    )
    yield _Measure(
        "Prefers the chosen answer, per token",
        "Share of pairs in which the chosen answer's tokens are likelier on average than the rejected one's.",
        "{:.0%}".format,
        _logged("eval_logps/preferred_per_token"),
        row.get("eval_logps/preferred_per_token_reference"),
    )
    yield _Measure(
        "Margin",
        "Reward of the chosen answer minus that of the rejected one, on average.",
        _signed(2),
        _logged("eval_rewards/margins"),
        0.0 if refers else None,
    )


def _of_answers(row: Row, means: bool) -> Iterator[_Measure]:
    yield _Measure(
        "Log-probability of the chosen answers",
        f"Nats{' a token' if means else ''}, on average; nearer to 0 is likelier.",
        _signed(2 if means else 1),
        _logged("eval_logps/chosen"),
        None if means else row.get("eval_logps/chosen_reference"),
    )
    yield _Measure(
        "Its change since before training",
        "Nats an answer, on average; below 0 the model has become less likely to give them.",
        _signed(1),
        _logged("eval_logps/chosen_shift"),
        0.0,
    )


def _logged(key: str) -> Callable[[Row], _Value | None]:
    return lambda row: (row[key], row.get(f"{key}_low"), row.get(f"{key}_high")) if key in row else None


def _signed(digits: int) -> _Writing:
    return lambda value: f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else "0"


def _table_row(measure: _Measure, shown: Sequence[Row], places: Sequence[str]) -> str:
    before = None if measure.before is None else (measure.before, None, None)
    values = [before, *(measure.at(row) for row in shown)]
    cells = (
        f'<td data-at="{place}">{_cell(measure.write, value)}</td>' for place, value in zip(places, values, strict=True)
    )
    return f"<tr><th>{html.escape(measure.name)}<small>{html.escape(measure.meaning)}</small></th>{''.join(cells)}</tr>"


def _cell(write: _Writing, value: _Value | None) -> str:
    if value is None:
        return "–"
    mean, low, high = value
    interval = "" if low is None or high is None else f" <i>({write(low)} to {write(high)})</i>"
    return write(mean) + interval
