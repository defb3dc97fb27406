"""Before the first update: do completions end, and is never ending worth less than any ending?"""

import pytest
import torch

from align.rejection.diagnostics import check_equal_rewards, equal_reward_fraction
from align.rejection.selection import Candidate
from align.rl.first_completions import check_endings, check_missing_eos_reward, ends_with_stop_token

ENDED, CUT = True, False


@pytest.mark.parametrize(
    ("rewards", "ended", "missing", "expected"),
    [
        ([-10.2, -10.4, -1.0], [ENDED, ENDED, CUT], -1.0, "-1 is not below the rewards of 2 of the 2"),
        ([-10.2, -10.4, -1.0], [ENDED, ENDED, CUT], -1.0, "(lowest -10.4, mean -10.3)"),
        ([-10.2, -10.4, -1.0], [ENDED, ENDED, CUT], -1.0, "ppo.missing_eos_reward=-11"),
        ([0.5, -1.5, 2.0, -1.0], [ENDED, ENDED, ENDED, CUT], -1.0, "1 of the 3 completions that end"),
        ([0.5, -1.0], [ENDED, ENDED], -1.0, "1 of the 2"),
        ([0.0, 0.0], [ENDED, ENDED], 0.0, "ppo.missing_eos_reward=-1"),
        (
            [0.5, 1.0],
            [ENDED, ENDED],
            -1.0,
            "-1 is below the rewards of all 2 completions that end (lowest 0.5)",
        ),
        ([30.0, 10.0], [ENDED, ENDED], 5.0, "5 is below the rewards of all 2"),
        # The rewards of completions without EOS are the missing reward itself, and do not count.
        ([0.5, -9.0], [ENDED, CUT], -1.0, "below the rewards of all 1"),
        ([-5.0, -5.0], [ENDED, ENDED], None, ""),
        ([-5.0, -5.0], [CUT, CUT], -1.0, ""),
    ],
)
def test_never_ending_is_compared_with_every_ending(
    rewards: list[float], ended: list[bool], missing: float | None, expected: str
) -> None:
    results = check_missing_eos_reward(torch.tensor(rewards), torch.tensor(ended), missing)
    assert bool(results) == bool(expected)
    for result in results:
        assert expected in result.detail and result.problem is None
        assert result.warned == ("not below" in result.detail)


@pytest.mark.parametrize("rewards", [[-10.2, -10.4], [0.0, 0.0, 3.0], [-1.0], [5.0, -7.5]])
def test_the_suggested_value_is_below_every_ending(rewards: list[float]) -> None:
    ended = torch.tensor([True] * len(rewards))
    [result] = check_missing_eos_reward(torch.tensor(rewards), ended, max(rewards))
    suggested = float(result.detail.rpartition("ppo.missing_eos_reward=")[2])
    [followed] = check_missing_eos_reward(torch.tensor(rewards), ended, suggested)
    assert suggested < min(rewards) and not followed.warned


@pytest.mark.parametrize(("num_ended", "warned"), [(0, True), (1, True), (2, False), (20, False)])
def test_completions_that_do_not_end_are_reported(num_ended: int, warned: bool) -> None:
    results = check_endings([True] * num_ended + [False] * (20 - num_ended), 2)
    assert len(results) == warned
    for result in results:
        assert f"{num_ended} of the first 20 completions end within 2 tokens" in result.detail
        assert result.warned and "raise sampling.max_new_tokens" in result.detail
    assert check_endings([], 2) == []


def test_the_last_token_decides_whether_a_completion_ended() -> None:
    assert ends_with_stop_token([[5, 2], [2, 5], [], [7]], [2, 7]) == [True, False, False, True]


@pytest.mark.parametrize(
    ("rewards", "fraction"),
    [
        ([[1, 1], [2, 2]], 1.0),
        ([[1, 1], [2, 3]], 0.5),
        ([[1, 2], [2, 3], [0, 0]], 1 / 3),
        ([[1, 2], [3, 1]], 0.0),
    ],
)
def test_equal_rewards_of_a_prompt_are_counted(rewards: list[list[float]], fraction: float) -> None:
    candidates = [
        Candidate(prompt, "text", True, float(reward))
        for prompt, group in enumerate(rewards)
        for reward in group
    ]
    assert equal_reward_fraction(candidates) == pytest.approx(fraction)
    results = check_equal_rewards(fraction, ["mine"])
    assert len(results) == (fraction >= 0.5)
    for result in results:
        assert f"{fraction:.0%} of the prompts have equal rewards" in result.detail
        assert "raise sampling.temperature or rejection.num_generations" in result.detail
