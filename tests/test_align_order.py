"""Which examples make up which step, and how fast each step learns."""

import pytest

from mlx_dpo.align.schedule import default_rate, learning_rate, warmup_steps
from mlx_dpo.data.batches import Order, by_cost, by_length


def epoch(order: Order, number: int) -> list[list[int]]:
    first = number * order.steps_an_epoch
    return [order.window(step) for step in range(first, first + order.steps_an_epoch)]


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (4, 1), (4, 3), (5, 2), (32, 1), (2, 8)])
def test_an_epoch_holds_every_example_once_in_windows_no_larger_than_asked(batch: int, accumulation: int):
    order = Order(23, batch, accumulation, seed=5, shuffle=True)
    for number in range(3):
        windows = epoch(order, number)
        assert sorted(i for window in windows for i in window) == list(range(23))
        assert all(0 < len(window) <= batch * accumulation for window in windows)


def test_only_the_last_window_is_smaller():
    assert [len(window) for window in epoch(Order(23, 4, 3, seed=0, shuffle=False), 0)] == [12, 11]


def test_the_order_is_that_of_the_rows_unless_shuffled():
    assert Order(5, 2, 1, seed=9, shuffle=False).window(4) == [2, 3]
    assert Order(5, 2, 1, seed=9, shuffle=False).window(2) == [4]


@pytest.mark.parametrize(("most", "budget"), [(3, None), (3, 20.0), (9, 20.0), (1, 5.0), (9, 5.0), (9, None)])
def test_batches_by_cost_hold_all_and_keep_within_count_and_budget(most: int, budget: float | None):
    costs = [3.0, 9.0, 1.0, 9.0, 5.0, 2.0, 2.0, 7.0]
    items = list(range(10, 18))
    batches = by_cost(items, costs, most, budget)
    assert sorted(i for batch in batches for i in batch) == items
    for batch in batches:
        assert len(batch) <= most
        assert budget is None or len(batch) == 1 or sum(costs[i - 10] for i in batch) <= budget
    least = max(-(-8 // most), 1 if budget is None else -(-38 // int(budget)))
    assert len(batches) <= (8 if budget == 5.0 else least + 1)


def test_the_order_is_a_function_of_the_seed_and_the_step_alone():
    first, again, other = (Order(40, 4, 1, seed, shuffle=True) for seed in (3, 3, 4))
    steps = range(25)
    forward = [first.window(step) for step in steps]
    assert forward == [again.window(step) for step in reversed(steps)][::-1]
    assert forward != [other.window(step) for step in steps]
    assert epoch(first, 0) != epoch(first, 1)


def test_steps_of_whole_and_broken_epochs():
    order = Order(10, 4, 1, seed=0, shuffle=True)
    assert [order.steps(epochs) for epochs in (1, 2, 0.5, 0.01, 1.1)] == [3, 6, 2, 1, 4]


def test_batches_by_length_hold_all_and_pad_little():
    assert by_length([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]


def test_linear_schedule_by_hand():
    rates = [learning_rate(step, 10, 2.0, "linear", 2) for step in range(10)]
    assert rates == pytest.approx([0, 1, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25])


def test_cosine_schedule_by_hand():
    # ½(1 + cos(π·k/6)) for k = 0 … 5
    rates = [learning_rate(step, 6, 1.0, "cosine", 0) for step in range(6)]
    assert rates == pytest.approx([1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873])


def test_constant_schedule_by_hand():
    assert [learning_rate(step, 5, 0.3, "constant", 3) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.3])


def test_warmup_is_a_share_below_one_and_steps_above():
    assert [warmup_steps(*given) for given in ((0.1, 15), (0.0, 15), (3, 15), (0.5, 9))] == [2, 0, 3, 5]


def test_the_rate_that_is_left_open_goes_with_one_over_the_width():
    assert [default_rate(width) for width in (64, 576, 1152, 4096)] == pytest.approx([1e-3, 1e-3, 5e-4, 1.40625e-4])
