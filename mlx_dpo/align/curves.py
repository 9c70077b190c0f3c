"""Which charts a run has: its numbers step by step, over held-out pairs and of sampled answers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlx_dpo.align import history
from mlx_dpo.align.charts import Point, Series, line_chart
from mlx_dpo.align.demands import loss_of
from mlx_dpo.align.history import Row
from mlx_dpo.align.options import TrainOptions


class Curve(NamedTuple):
    """A chart: its title, the series in it, the unit, and what its y axis takes in beside them."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    within: tuple[float, ...] = ()


class _Run(NamedTuple):
    """The rows that stand, those of each attempt that was taken back, and those of samples.jsonl."""

    rows: Sequence[Row]
    attempts: Sequence[Sequence[Row]]
    answered: Sequence[Row]

    def line(self, name: str, key: str) -> Series:
        return Series(name, _points(self.rows, key), (), [_points(attempt, key) for attempt in self.attempts])

    def held_out(self, key: str) -> Series:
        low, high = f"eval_{key}_low", f"eval_{key}_high"
        intervals = [(row["step"], row[low], row[high]) for row in self.rows if low in row]
        return self.line("held out", f"eval_{key}")._replace(intervals=intervals)

    def both(self, key: str) -> list[Series]:
        return [self.line("training", key), self.held_out(key)]

    def sides(self, key: str) -> list[Series]:
        return [self.line(side, f"{key}/{side}") for side in ("chosen", "rejected")]

    def sampled(self, key: str) -> list[Series]:
        return [Series("sampled answers", _points(self.answered, key))]


def charts(options: TrainOptions, rows: Sequence[Row], answered: Sequence[Row]) -> list[str]:
    """The charts of a run as SVG, from the rows of metrics.jsonl and samples.jsonl; those without a number are not."""
    attempts = list(history.attempts(rows))
    run = _Run(rows, attempts, answered)
    rescued = [row["step"] for row in history.rescues(rows)]
    every = [row["step"] for part in (rows, answered, *attempts) for row in part]
    over = (min(every), max(every)) if every else ()
    curves = [*_of_preferences(options, run), *_of_answers(options, run), *_of_the_machine(run)]
    drawn = (line_chart(*curve, over=over, rescues=rescued) for curve in curves)
    return [picture for picture in drawn if picture]


def _of_preferences(options: TrainOptions, run: _Run) -> Iterator[Curve]:
    reward = "β × log-ratio" if loss_of(options).needs_reference else "β × log p"
    yield Curve("Loss", run.both("loss"))
    yield Curve("Reward accuracy", run.both("rewards/accuracies"), "share of pairs", (0, 1))
    yield Curve("Rewards", run.sides("rewards"), reward, (0,))
    yield Curve("Margin", run.both("rewards/margins"), "reward of chosen − rejected", (0,))
    opening = run.both("margins/opening_share")
    yield Curve("Share of the margin in the first five tokens", opening, "1 means all of it", (0, 1))
    strangers = [run.line("training", "kl"), run.line("held out", "eval_kl_of_strangers")]
    yield Curve("KL that KTO measures rewards from", strangers, "nats an answer", (0,))


def _of_answers(options: TrainOptions, run: _Run) -> Iterator[Curve]:
    nats = "nats a token" if loss_of(options).takes_means else "nats"
    yield Curve("Log-probability of answers", run.sides("logps"), nats)
    shift = run.both("logps/chosen_shift")
    yield Curve("Chosen answers against the start", shift, "change of log-probability, nats", (0,))
    yield Curve("KL from the base along sampled answers", run.sampled("kl"), "nats a token", (0,))
    tokens = f"tokens on average, cut off at {options.sample_tokens}"
    yield Curve("Length of sampled answers", run.sampled("tokens"), tokens, (0,))


def _of_the_machine(run: _Run) -> Iterator[Curve]:
    yield Curve("Gradient norm", [run.line("before clipping", "grad_norm")], "before clipping", (0,))
    yield Curve("Learning rate", [run.line("rate", "learning_rate")], "", (0,))
    yield Curve("Speed", [run.line("tokens", "tokens_per_second")], "tokens a second", (0,))
    yield Curve("Peak memory", [run.line("memory", "peak_memory_gb")], "GB", (0,))


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]
