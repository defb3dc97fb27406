"""Early stopping of PPO and its reasons; diagnostics of a finished run."""

import pytest

from align.ppo.panel import findings
from align.ppo.settings import StopSettings
from align.ppo.stop_rule import over_optimised, why_stop

FIRST = {"kl": 0.0, "entropy": 2.0, "ends": 0.9, "length": 20.0, "length_reward": 0.0}


@pytest.mark.parametrize(
    ("now", "rules", "words"),
    [
        ({"entropy": 0.03}, {}, ["collapsed", "entropy", "2.000 to 0.030", "stop.entropy"]),
        ({"entropy": 0.05}, {}, []),
        ({"ends": 0.05}, {}, ["collapsed", "5.0% of the completions end", "90.0% did", "stop.ends"]),
        ({"ends": 0.2}, {}, []),
        ({"kl": 31.0}, {"kl": 30.0}, ["KL to the reference", "31.00 nats", "stop.kl (30)"]),
        ({"kl": 31.0}, {}, []),
        ({"length": 45.0, "length_reward": 0.6}, {"longer": 2.0}, ["length hacking", "20.0 to 45.0", "0.60"]),
        ({"length": 45.0, "length_reward": 0.1}, {"longer": 2.0}, []),
        ({"length": 45.0, "length_reward": 0.6}, {}, []),
        ({"entropy": 0.0, "ends": 0.0, "kl": 99.0}, {"entropy": None, "ends": None}, []),
    ],
)
def test_a_run_is_stopped_for_a_reason(
    now: dict[str, float], rules: dict[str, float], words: list[str]
) -> None:
    reason = why_stop(FIRST, {**FIRST, **now}, StopSettings(**rules))
    assert bool(reason) == bool(words)
    assert all(word in reason for word in words), reason


def test_a_policy_that_never_ended_is_not_stopped_for_it() -> None:
    first = {**FIRST, "ends": 0.0}
    assert why_stop(first, first, StopSettings()) == ""


def at(reward: float, gold: float) -> dict[str, float]:
    return {"reward": reward, "gold_end": gold}


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ([at(0, 0.3), at(1, 0.8), at(2, 0.6)], True),
        ([at(0, 0.3), at(1, 0.8), at(2, 0.75)], False),
        ([at(0, 0.3), at(1, 0.8), at(0.5, 0.5)], False),
        ([at(0, 0.8), at(1, 0.6)], True),
        ([{"reward": 0.0}, {"reward": 3.0}], False),
    ],
    ids=["gold fell", "by little", "and the reward too", "from the start", "no grader"],
)
def test_pain_07_over_optimisation_is_a_higher_reward_and_a_worse_judgement(
    history: list[dict[str, float]], stops: bool
) -> None:
    reason = over_optimised(history, StopSettings())
    assert bool(reason) == stops
    if stops:
        assert reason.startswith(
            "over-optimized: grader 'end' fell from 0.800 to 0.600 while the reward rose"
        )
    assert over_optimised(history, StopSettings(gold_falls=None)) == ""


def both(**ends: tuple[float, float]) -> dict[str, float]:
    return {
        f"held_out_{name}_{when}": pair[place]
        for name, pair in ends.items()
        for place, when in enumerate(("before", "after"))
    }


SOUND = both(
    reward=(0.0, 1.0),
    gold_end=(0.3, 0.9),
    kl=(0.0, 4.0),
    perplexity=(2.0, 2.5),
    length=(20.0, 22.0),
    ends=(1.0, 1.0),
    entropy=(1.0, 0.6),
    distinct=(1.0, 0.9),
) | {"clipped_after": 0.1, "explained_variance_after": 0.5}


SAID = [("one two", "three four"), ("five", "six")]


def test_replies_that_go_round_are_told() -> None:
    again = "he was very happy. " * 3
    [found] = findings({}, [("one two", again), ("five", again)])
    assert (
        found.name == "repetition"
        and "of 2 completions, self-repeating: 0 → 2, duplicates of another one: 0 → 1" in found.said
    )
    assert "kl_coefficient" in found.action


def test_a_sound_run_is_praised_without_a_warning() -> None:
    found = {finding.name: finding for finding in findings(SOUND, SAID)}
    assert list(found) == ["reward", "graders", "KL", "fluency", "length", "variety", "updates"]
    assert not any(finding.action for finding in found.values())
    assert "0.300 → 0.900" in found["graders"].said


@pytest.mark.parametrize(
    ("changed", "name", "action"),
    [
        (both(reward=(0.0, 0.0)), "reward", "learning_rate"),
        (both(gold_end=(0.9, 0.3)), "graders", "kl_coefficient"),
        (both(kl=(0.0, -1.0)), "KL", "bug"),
        (both(kl=(0.0, 60.0)), "KL", "kl_target"),
        (both(perplexity=(2.0, 9.0)), "fluency", "kl_coefficient"),
        (both(length=(20.0, 60.0)), "length", "length_penalty"),
        (both(length=(20.0, 5.0)), "length", "kl_coefficient"),
        (both(ends=(1.0, 0.5)), "length", "missing_end"),
        (both(distinct=(1.0, 0.2)), "variety", "entropy_coefficient"),
        ({"clipped_after": 0.6}, "updates", "learning_rate"),
        ({"explained_variance_after": -0.4}, "updates", "value_coefficient"),
    ],
)
def test_what_went_wrong_is_told_with_a_remedy(changed: dict[str, float], name: str, action: str) -> None:
    warned = [finding for finding in findings(SOUND | changed, SAID) if finding.action]
    assert [finding.name for finding in warned] == [name] and action in warned[0].action


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert findings({}, []) == []
