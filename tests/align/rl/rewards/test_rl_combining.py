"""Combined rewards, by hand."""

import numpy as np
import pytest

from align.rl.rewards.rewards import length_penalty, piecewise, weighted_sum


def test_weighted_sum() -> None:
    parts = {"a": np.array([1.0, 2.0]), "b": np.array([10.0, -10.0])}
    assert weighted_sum(parts, {"a": 0.5, "b": 0.1}).tolist() == [1.5, 0.0]


def test_llama2_piecewise_reward() -> None:
    """The sigmoid of -1.73 is 0.1506, that of -1.74 is 0.1493: the threshold lies between them."""
    safety = np.array([-1.73, -1.74, 3.0, 3.0])
    helpfulness = np.array([5.0, 6.0, 7.0, 8.0])
    rewards = piecewise(helpfulness, safety, [False, False, False, True], safety_threshold=0.15)
    assert rewards.tolist() == [5.0, -1.74, 7.0, 3.0]


@pytest.mark.parametrize(("free", "expected"), [(0, [-0.0, -0.3, -0.8]), (3, [0.0, 0.0, -0.5])])
def test_length_penalty(free: int, expected: list[float]) -> None:
    assert length_penalty([0, 3, 8], per_token=0.1, free_tokens=free) == pytest.approx(expected)
