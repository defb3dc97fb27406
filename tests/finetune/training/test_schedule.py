"""The learning rate schedule: no step has a rate of 0, and warm-up fits the run."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from finetune.recipe.settings import TrainSettings
from finetune.training.schedule import SchedulePart, build_schedule, check_schedule, check_warmup

DECAYS = ("linear", "cosine", "constant")


def factors(
    decay: str,
    warmup: float,
    num_steps: int,
    part: SchedulePart = SchedulePart(),  # noqa: B008 - frozen
) -> list[float]:
    schedule = build_schedule(decay, warmup, num_steps, part)
    return [schedule.factor(step) for step in range(num_steps)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 500, 0.03, 0.5, 0.999])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
def test_no_step_has_a_rate_of_0_and_the_peak_is_reached(decay: str, warmup: float, num_steps: int) -> None:
    rates = factors(decay, warmup, num_steps)
    assert min(rates) > 0 and max(rates) == 1.0
    peak = rates.index(1.0)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert len(check_warmup(TrainSettings(warmup=warmup), num_steps)) == (warmup > num_steps)


@pytest.mark.parametrize(
    ("decay", "warmup", "num_steps", "expected"),
    [
        ("linear", 0.03, 1, [1.0]),
        ("cosine", 0.03, 2, [1.0, 1.0]),
        ("linear", 4, 8, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.5, 4, [0.5, 1.0, 1.0, 0.5]),
        ("cosine", 0, 4, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("constant", 2, 4, [0.5, 1.0, 1.0, 1.0]),
        ("cosine", 150, 4, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_rates_by_hand(decay: str, warmup: float, num_steps: int, expected: list[float]) -> None:
    assert factors(decay, warmup, num_steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_warmup_the_rates_are_those_of_transformers_bit_for_bit(decay: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    library = get_scheduler(decay, optimizer, num_warmup_steps=0, num_training_steps=37)
    assert isinstance(library, LambdaLR)
    assert factors(decay, 0, 37) == [library.lr_lambdas[0](step) for step in range(37)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 3, 5, 12, 0.25])
def test_equal_rounds_have_the_rates_of_one_run(decay: str, warmup: float) -> None:
    rounds = [factors(decay, warmup, 4, SchedulePart(index, 3, 4 if index else None)) for index in range(3)]
    assert sum(rounds, []) == pytest.approx(factors(decay, warmup, 12), abs=1e-12)


def test_rounds_of_other_lengths_continue_the_schedule() -> None:
    long, short = (factors("linear", 2, steps, SchedulePart(1, 2, 10)) for steps in (40, 2))
    # Warm-up was in the first round; a round begins where the last one ended, and the last one ends near 0.
    assert (
        long[0]
        == pytest.approx(short[0])
        == pytest.approx(factors("linear", 2, 10, SchedulePart(1, 2, 10))[0])
    )
    assert short == pytest.approx([10 / 18, 5 / 18]) and long[-1] == pytest.approx(1 / 72)


def problems(train: TrainSettings, num_steps: int, part: SchedulePart = SchedulePart()) -> list[str]:  # noqa: B008
    return [result.problem.actual for result in check_schedule(train, num_steps, part) if result.problem]


def test_a_warmup_longer_than_the_run_is_refused_once_with_all_rounds() -> None:
    train = TrainSettings(warmup=50)
    assert problems(train, 20) == ["50 steps, but the run has 20 optimizer steps"]
    assert problems(train, 25, SchedulePart(0, 2)) == problems(train, 20, SchedulePart(1, 2, 20)) == []
    assert problems(train, 20, SchedulePart(0, 2)) == ["50 steps, but the run has 40 optimizer steps"]


def test_few_steps_and_intervals_without_effect_are_reported() -> None:
    train = TrainSettings(warmup=0, epochs=2, batch_size=4, evaluate_every=50)
    few, interval = check_schedule(train, 7)
    assert few.warned and few.detail.startswith("only 7 optimizer steps: the model may change little")
    assert "train.epochs=6, a smaller train.batch_size (4)" in few.detail
    assert "train.evaluate_every=50 is more than the run's 7 steps: it has no effect" in interval.detail
    # A number of steps that the user typed is meant.
    assert check_schedule(TrainSettings(warmup=0, max_steps=3), 3) == []
