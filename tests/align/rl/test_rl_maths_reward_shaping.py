"""Reward shaping by hand, and running statistics against those of all scores at once."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.rl.maths.advantages import RunningMeanStd, apply_missing_eos_reward, clip_rewards

STOPPED = torch.tensor([True, False, False])


def test_missing_eos_reward_replaces_the_score() -> None:
    """Scores 2, -4, 7, the last two without EOS: even a worse score becomes -1."""
    scores = torch.tensor([2.0, -4.0, 7.0])
    assert apply_missing_eos_reward(scores, STOPPED, missing_eos_reward=-1.0).tolist() == [2.0, -1.0, -1.0]
    assert apply_missing_eos_reward(scores, STOPPED, missing_eos_reward=None) is scores
    assert scores.tolist() == [2.0, -4.0, 7.0], "nothing is changed in place"


def test_missing_eos_reward_replaces_nan() -> None:
    scores = torch.tensor([2.0, torch.nan, 7.0])
    assert apply_missing_eos_reward(scores, STOPPED, missing_eos_reward=-1.0).tolist() == [2.0, -1.0, -1.0]


def test_clipped_rewards_keep_their_sign() -> None:
    assert clip_rewards(torch.tensor([-3.0, -1.0, 9.0]), limit=2.0).tolist() == [-2.0, -1.0, 2.0]


@given(
    batches=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), min_size=1, max_size=6)
)
@settings(deadline=None)
def test_running_statistics_equal_batch_statistics(batches: list[list[float]]) -> None:
    running = RunningMeanStd()
    for batch in batches:
        running = running.updated(torch.tensor(batch))
    everything = torch.tensor([score for batch in batches for score in batch], dtype=torch.float64)
    assert running.count == len(everything)
    assert running.mean == pytest.approx(everything.mean().item(), abs=1e-9)
    squares = ((everything - everything.mean()) ** 2).sum().item()
    assert running.m2 == pytest.approx(squares, rel=1e-9, abs=1e-6)
    assert RunningMeanStd(**json.loads(json.dumps(asdict(running)))) == running, "to the last bit"


def test_running_statistics_are_stable_far_from_0() -> None:
    """1e8 + {0, 1, 2}: variance 1, where the difference of the mean square and the squared mean is noise."""
    running = RunningMeanStd()
    for step in range(3):
        running = running.updated(torch.tensor([1e8 + step], dtype=torch.float64))
    assert running.std == pytest.approx(1.0, abs=1e-12)


def test_normalized_rewards_have_mean_0_and_std_1() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0])
    running = RunningMeanStd().updated(scores)
    assert running.std == pytest.approx(math.sqrt(7))
    shifted = running.normalize(scores, shift_mean=True)
    assert shifted.mean().item() == pytest.approx(0, abs=1e-6)
    assert shifted.std().item() == pytest.approx(1, abs=1e-6)
    scaled = running.normalize(scores, shift_mean=False)
    assert torch.allclose(scaled, scores / math.sqrt(7)) and torch.equal(scaled > 0, scores > 0)


@pytest.mark.parametrize("seen", [[], [3.0], [3.0, 3.0]])
def test_constant_rewards_are_not_scaled(seen: list[float]) -> None:
    """Division by almost 0 would blow up the first rollout of a constant reward."""
    running = RunningMeanStd().updated(torch.tensor(seen)) if seen else RunningMeanStd()
    assert running.std == 1.0
    assert running.normalize(torch.tensor([5.0]), shift_mean=False).tolist() == [5.0]
    assert running.normalize(torch.tensor([5.0]), shift_mean=True).tolist() == [5.0 - running.mean]
