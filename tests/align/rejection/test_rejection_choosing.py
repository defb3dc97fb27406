"""Selection of completions: best of each prompt or top fraction of all; ties go to the first."""

import numpy as np
import pytest

from align.rejection.choosing import Reply, best_of_each, best_of_n, eligible, top_share
from align.rejection.drawing import prompts_of_round


def reply(prompt: int, text: str, reward: float, *, ended: bool = True) -> Reply:
    return Reply(prompt, text, ended, reward)


DRAWN = [
    reply(5, "a", 1.0),
    reply(5, "b", 3.0),
    reply(5, "c", 3.0),
    reply(2, "d", -7.0),
    reply(2, "e", -9.0),
    reply(2, "d", -7.0),
]


def texts(replies: list[Reply]) -> str:
    return "".join(one.text for one in replies)


def test_the_best_of_each_prompt_is_the_first_drawn_of_equals() -> None:
    assert texts(best_of_each(DRAWN)) == "bd"
    assert texts(best_of_each(DRAWN[::-1])) == "dc", "prompts in the order in which they were sampled"
    assert best_of_each([]) == []


@pytest.mark.parametrize(("count", "expected"), [(1, "b"), (2, "bc"), (3, "abc"), (4, "abcd"), (9, "abcde")])
def test_the_best_of_all_may_leave_a_prompt_out_and_take_a_reply_once(count: int, expected: str) -> None:
    assert texts(top_share(DRAWN, count)) == expected


def test_the_first_drawn_of_equal_replies_is_taken() -> None:
    same = [reply(1, "x", 2.0), reply(1, "x", 2.0, ended=False)]
    assert top_share(same, 1) == [same[0]]


def test_what_has_no_end_or_too_small_a_reward_is_not_learnt() -> None:
    drawn = [reply(0, "a", 1.0), reply(0, "b", 2.0, ended=False), reply(0, "c", 0.5)]
    assert texts(eligible(drawn, above=None, unfinished=False)) == "ac"
    assert texts(eligible(drawn, above=None, unfinished=True)) == "abc"
    assert texts(eligible(drawn, above=0.5, unfinished=True)) == "ab", "above is not at least"


def test_the_mean_of_the_best_of_n() -> None:
    assert best_of_n(np.array([[1.0, 2.0, 0.0], [-1.0, -3.0, -2.0]])) == 0.5


def test_rounds_go_through_all_prompts_before_one_comes_again() -> None:
    rounds = [prompts_of_round(10, 4, number, seed=1) for number in (1, 2, 3, 4, 5)]
    assert sorted([*rounds[0], *rounds[1], *rounds[2][:2]]) == list(range(10))
    assert rounds[2][2:] == rounds[0][:2] and rounds[4][-4:] == prompts_of_round(10, 4, 5, seed=1)
    assert all(len(set(numbers)) == 4 for numbers in rounds)
    assert prompts_of_round(10, 4, 1, seed=2) != rounds[0]
    assert (
        sorted(prompts_of_round(3, None, 2, seed=0)) == [0, 1, 2] == sorted(prompts_of_round(3, 9, 1, seed=0))
    )
