"""Selection of completions: best of each prompt or top fraction of all; ties go to the first."""

import numpy as np
import pytest

from align.rejection.sampling import round_prompt_indices
from align.rejection.selection import Candidate, best_per_prompt, eligible, mean_best_of_n, top_candidates


def candidate(prompt: int, text: str, reward: float, *, ended_with_eos: bool = True) -> Candidate:
    return Candidate(prompt, text, ended_with_eos, reward)


CANDIDATES = [
    candidate(5, "a", 1.0),
    candidate(5, "b", 3.0),
    candidate(5, "c", 3.0),
    candidate(2, "d", -7.0),
    candidate(2, "e", -9.0),
    candidate(2, "d", -7.0),
]


def texts(candidates: list[Candidate]) -> str:
    return "".join(item.text for item in candidates)


def test_best_per_prompt_breaks_ties_by_sampling_order() -> None:
    assert texts(best_per_prompt(CANDIDATES)) == "bd"
    assert texts(best_per_prompt(CANDIDATES[::-1])) == "dc", "prompts in the order in which they were sampled"
    assert best_per_prompt([]) == []


@pytest.mark.parametrize(("count", "expected"), [(1, "b"), (2, "bc"), (3, "abc"), (4, "abcd"), (9, "abcde")])
def test_top_candidates_are_unique_across_prompts(count: int, expected: str) -> None:
    assert texts(top_candidates(CANDIDATES, count)) == expected


def test_first_of_equal_candidates_is_selected() -> None:
    equal = [candidate(1, "x", 2.0), candidate(1, "x", 2.0, ended_with_eos=False)]
    assert top_candidates(equal, 1) == [equal[0]]


def test_truncated_and_low_reward_candidates_are_not_eligible() -> None:
    candidates = [
        candidate(0, "a", 1.0),
        candidate(0, "b", 2.0, ended_with_eos=False),
        candidate(0, "c", 0.5),
    ]
    assert texts(eligible(candidates, min_reward=None, keep_truncated=False)) == "ac"
    assert texts(eligible(candidates, min_reward=None, keep_truncated=True)) == "abc"
    assert texts(eligible(candidates, min_reward=0.5, keep_truncated=True)) == "ab", "above is not at least"


def test_mean_best_of_n() -> None:
    assert mean_best_of_n(np.array([[1.0, 2.0, 0.0], [-1.0, -3.0, -2.0]])) == 0.5


def test_rounds_cycle_through_all_prompts() -> None:
    rounds = [round_prompt_indices(10, 4, number, seed=1) for number in (1, 2, 3, 4, 5)]
    assert sorted([*rounds[0], *rounds[1], *rounds[2][:2]]) == list(range(10))
    assert rounds[2][2:] == rounds[0][:2] and rounds[4][-4:] == round_prompt_indices(10, 4, 5, seed=1)
    assert all(len(set(numbers)) == 4 for numbers in rounds)
    assert round_prompt_indices(10, 4, 1, seed=2) != rounds[0]
    assert (
        sorted(round_prompt_indices(3, None, 2, seed=0))
        == [0, 1, 2]
        == sorted(round_prompt_indices(3, 9, 1, seed=0))
    )
