"""Combined rewards, by hand."""

import numpy as np
import pytest

from align.rl.rewards.combining import length_cost, piecewise, weighted_sum


def test_a_weighted_sum() -> None:
    parts = {"a": np.array([1.0, 2.0]), "b": np.array([10.0, -10.0])}
    assert weighted_sum(parts, {"a": 0.5, "b": 0.1}).tolist() == [1.5, 0.0]


def test_llama_2_s_piecewise_reward() -> None:
    """The sigmoid of -1.73 is 0.1506, that of -1.74 is 0.1493: the threshold lies between them."""
    safety = np.array([-1.73, -1.74, 3.0, 3.0])
    helpfulness = np.array([5.0, 6.0, 7.0, 8.0])
    found = piecewise(helpfulness, safety, [False, False, False, True], below=0.15)
    assert found.tolist() == [5.0, -1.74, 7.0, 3.0]


@pytest.mark.parametrize(("free", "expected"), [(0, [-0.0, -0.3, -0.8]), (3, [0.0, 0.0, -0.5])])
def test_the_cost_of_length(free: int, expected: list[float]) -> None:
    assert length_cost([0, 3, 8], per_token=0.1, free=free) == pytest.approx(expected)
