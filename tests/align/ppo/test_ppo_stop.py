"""Early stopping of PPO and its reasons; diagnostics of a finished run."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from align.ppo.diagnostics import diagnose_ppo
from align.ppo.settings import PPOSettings, Settings, StopSettings
from align.ppo.stop_rule import RewardHackingStop, over_optimization_reason, stop_reason
from finetune.evaluation.small_samples import paired_change

FIRST = {
    "objective/kl_per_completion": 0.0,
    "policy/entropy": 2.0,
    "val/eos_rate": 0.9,
    "val/completion_length": 20.0,
    "val/length_reward_corr": 0.0,
}


@pytest.mark.parametrize(
    ("now", "rules", "words"),
    [
        ({"policy/entropy": 0.03}, {}, ["collapsed", "entropy", "2.000 to 0.030", "stop.min_entropy_ratio"]),
        ({"policy/entropy": 0.05}, {}, []),
        (
            {"val/eos_rate": 0.05},
            {},
            ["collapsed", "5.0% of the completions end", "90.0% did", "stop.min_eos_rate"],
        ),
        ({"val/eos_rate": 0.2}, {}, []),
        (
            {"objective/kl_per_completion": 31.0},
            {"max_kl": 30.0},
            ["KL to the reference", "31.00 nats", "stop.max_kl (30)"],
        ),
        ({"objective/kl_per_completion": 31.0}, {}, []),
        (
            {"val/completion_length": 45.0, "val/length_reward_corr": 0.6},
            {"max_length_ratio": 2.0},
            ["length hacking", "20.0 to 45.0", "0.60"],
        ),
        ({"val/completion_length": 45.0, "val/length_reward_corr": 0.1}, {"max_length_ratio": 2.0}, []),
        ({"val/completion_length": 45.0, "val/length_reward_corr": 0.6}, {}, []),
        (
            {"policy/entropy": 0.0, "val/eos_rate": 0.0, "objective/kl_per_completion": 99.0},
            {"min_entropy_ratio": None, "min_eos_rate": None},
            [],
        ),
    ],
)
def test_stop_reasons(now: dict[str, float], rules: dict[str, float], words: list[str]) -> None:
    reason = stop_reason(FIRST, {**FIRST, **now}, StopSettings(**rules))
    assert bool(reason) == bool(words)
    assert all(word in reason for word in words), reason


def test_eos_collapse_requires_a_fall() -> None:
    first = {**FIRST, "val/eos_rate": 0.0}
    assert stop_reason(first, first, StopSettings()) == ""


def held_out_metrics(reward: float, gold: float) -> dict[str, float]:
    return {"objective/reward": reward, "gold/end": gold}


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ([held_out_metrics(0, 0.3), held_out_metrics(1, 0.8), held_out_metrics(2, 0.6)], True),
        ([held_out_metrics(0, 0.3), held_out_metrics(1, 0.8), held_out_metrics(2, 0.75)], False),
        ([held_out_metrics(0, 0.3), held_out_metrics(1, 0.8), held_out_metrics(0.5, 0.5)], False),
        ([held_out_metrics(0, 0.8), held_out_metrics(1, 0.6)], True),
        ([{"objective/reward": 0.0}, {"objective/reward": 3.0}], False),
    ],
    ids=["gold fell", "by little", "and the reward too", "from the start", "no grader"],
)
def test_pain_07_over_optimization_is_higher_reward_with_lower_gold(
    history: list[dict[str, float]], stops: bool
) -> None:
    reason = over_optimization_reason(history, StopSettings())
    assert bool(reason) == stops
    if stops:
        assert reason.startswith(
            "over-optimized: grader 'end' fell from 0.800 to 0.600 while the reward rose"
        )
    assert over_optimization_reason(history, StopSettings(max_gold_drop=None)) == ""


@pytest.mark.parametrize("signaled", [False, True])
@pytest.mark.parametrize("step", [6, 12])
def test_a_run_that_stops_leaves_no_checkpoint_to_resume_from(signaled: bool, step: int) -> None:
    recorded: list[str] = []
    run = SimpleNamespace(update=lambda stop_reason: recorded.append(stop_reason))
    context: Any = SimpleNamespace(settings=Settings(), log=print, run=run)
    stop = RewardHackingStop(context, SimpleNamespace(first_metrics=FIRST))  # type: ignore[arg-type]
    # A signal and the last step both have told the trainer to stop already, and to save.
    control = TrainerControl(should_training_stop=signaled or step == 12, should_save=True)
    collapsed = {**FIRST, "policy/entropy": 0.0, "objective/kl_coef": 0.1}
    for _ in range(2):
        state = TrainerState(global_step=step, max_steps=12)
        stop.on_log(TrainingArguments(), state, control, logs=collapsed)
    assert (control.should_training_stop, control.should_save) == (True, step == 12)
    assert [reason.split(",")[0] for reason in recorded] == [
        "stopped at step 6: collapsed: entropy fell from 2.000 to 0.000 nats per token"
    ] * (step == 6)


NAMES = {
    "reward": "objective/reward",
    "kl": "objective/kl_per_completion",
    "perplexity": "val/ref_perplexity",
    "length": "val/completion_length",
    "ends": "val/eos_rate",
    "entropy": "policy/entropy",
    "distinct": "val/unique_fraction",
    "gold_end": "gold/end",
}


def before_and_after(**values: tuple[float, float]) -> dict[str, float]:
    return {
        f"eval/{NAMES.get(name, name)}_{when}": pair[index]
        for name, pair in values.items()
        for index, when in enumerate(("before", "after"))
    }


HEALTHY = before_and_after(
    gold_end=(0.3, 0.9),
    kl=(0.0, 4.0),
    perplexity=(2.0, 2.5),
    length=(20.0, 22.0),
    ends=(1.0, 1.0),
    entropy=(1.0, 0.6),
    distinct=(1.0, 0.9),
) | {"policy/clip_frac_after": 0.1, "value/explained_variance_after": 0.5}


COMPLETION_PAIRS = [("one two", "three four"), ("five", "six")]


def test_repetition_is_reported() -> None:
    repetitive = "he was very happy. " * 3
    pairs = [("one two", repetitive), ("five", repetitive)]
    [finding] = diagnose_ppo({}, pairs, PPOSettings(), num_held_out=64, reward=None)
    assert (
        finding.name == "repetition"
        and "of 2 completions, self-repeating: 0 → 2, duplicates of another one: 0 → 1" in finding.evidence
    )
    assert "kl_coef" in finding.action


def test_healthy_run_has_no_action() -> None:
    reward = paired_change([0.0, 1.0] * 32, [1.0, 2.0] * 32)
    findings = diagnose_ppo(HEALTHY, COMPLETION_PAIRS, PPOSettings(), num_held_out=64, reward=reward)
    findings_by_name = {finding.name: finding for finding in findings}
    assert list(findings_by_name) == ["reward", "graders", "KL", "fluency", "length", "diversity", "updates"]
    assert not any(finding.action for finding in findings_by_name.values())
    assert "0.300 → 0.900" in findings_by_name["graders"].evidence


@pytest.mark.parametrize(
    ("changed", "name", "action"),
    [
        (before_and_after(gold_end=(0.9, 0.3)), "graders", "kl_coef"),
        (before_and_after(kl=(0.0, -1.0)), "KL", "bug"),
        (before_and_after(kl=(0.0, 60.0)), "KL", "adaptive_kl_target"),
        (before_and_after(perplexity=(2.0, 9.0)), "fluency", "kl_coef"),
        (before_and_after(length=(20.0, 60.0)), "length", "length_penalty"),
        (before_and_after(length=(20.0, 5.0)), "length", "kl_coef"),
        (before_and_after(ends=(1.0, 0.5)), "length", "lower ppo.missing_eos_reward (-1) below every reward"),
        (before_and_after(ends=(0.05, 0.0)), "length", "raise sampling.max_new_tokens"),
        (before_and_after(entropy=(1.0, 2.5)), "diversity", "lower train.learning_rate"),
        (before_and_after(distinct=(1.0, 0.2)), "diversity", "entropy_coef"),
        ({"policy/clip_frac_after": 0.6}, "updates", "lower ppo.ppo_epochs"),
        ({"value/explained_variance_after": -0.4}, "updates", "value_coef"),
    ],
)
def test_each_problem_has_a_finding_with_an_action(changed: dict[str, float], name: str, action: str) -> None:
    findings = diagnose_ppo(HEALTHY | changed, COMPLETION_PAIRS, PPOSettings(), num_held_out=64, reward=None)
    warned = [finding for finding in findings if finding.action]
    assert [finding.name for finding in warned] == [name] and action in warned[0].action


@pytest.mark.parametrize(
    ("changed", "name", "meaning"),
    [
        (before_and_after(gold_end=(0.3, 0.9)), "graders", "score completions higher"),
        (before_and_after(gold_end=(0.9, 0.3)), "graders", "scores completions lower"),
        (before_and_after(gold_end=(0.9, 0.88)), "graders", "changed little"),
        (before_and_after(perplexity=(2.0, 2.5)), "fluency", "less likely than before, within bounds"),
        (before_and_after(perplexity=(2.0, 1.5)), "fluency", "as likely as before, or more"),
        (before_and_after(perplexity=(2.0, 9.0)), "fluency", "unlikely text"),
        (before_and_after(length=(20.0, 60.0)), "length", "longer"),
        (before_and_after(length=(60.0, 20.0)), "length", "much shorter"),
        (before_and_after(ends=(0.5, 1.0)), "length", "about as long as before"),
        (before_and_after(ends=(1.0, 0.5)), "length", "fewer completions end with EOS"),
        (before_and_after(entropy=(1.0, 0.6)), "diversity", "lower, as expected in RL"),
        (before_and_after(entropy=(1.0, 1.2)), "diversity", "not lower"),
        (before_and_after(entropy=(1.0, 2.5)), "diversity", "the policy became random"),
    ],
)
def test_the_meaning_follows_the_sign_of_the_change(
    changed: dict[str, float], name: str, meaning: str
) -> None:
    findings = diagnose_ppo(HEALTHY | changed, COMPLETION_PAIRS, PPOSettings(), num_held_out=64, reward=None)
    [finding] = [finding for finding in findings if finding.name == name]
    assert meaning in finding.meaning


def test_the_advice_depends_on_the_settings() -> None:
    changed = before_and_after(ends=(1.0, 0.5), entropy=(1.0, 2.5))
    changed |= {"policy/clip_frac_after": 0.6}
    settings = PPOSettings(missing_eos_reward=None, entropy_coef=0.01, ppo_epochs=1)
    findings = diagnose_ppo(HEALTHY | changed, COMPLETION_PAIRS, settings, num_held_out=64, reward=None)
    actions = {finding.name: finding.action for finding in findings}
    assert actions["length"].startswith("set ppo.missing_eos_reward below every reward")
    assert actions["diversity"] == "lower ppo.entropy_coef"
    assert actions["updates"].startswith("raise train.batch_size")


@pytest.mark.parametrize(
    ("kl", "num_held_out", "is_bug"),
    [(-0.2, 64, False), (-0.23, 64, True), (-3.0, 4, False), (-3.5, 4, True), (-0.06, 256, True)],
)
def test_a_negative_kl_is_a_bug_only_beyond_its_noise(kl: float, num_held_out: int, is_bug: bool) -> None:
    """exp(-n t) = 1e-6 is the most that noise exceeds -t = ln(1e-6) / n = -13.8 / n with."""
    changed = HEALTHY | before_and_after(kl=(0.0, kl))
    findings = diagnose_ppo(changed, COMPLETION_PAIRS, PPOSettings(), num_held_out=num_held_out, reward=None)
    [finding] = [finding for finding in findings if finding.name == "KL"]
    assert ("this is a bug" in finding.action) == is_bug


def test_the_noise_of_a_kl_is_within_its_bound() -> None:
    """Policies that differ much from their reference: the mean of few k1 is often negative, never a bug."""
    rng = np.random.default_rng(0)
    policy, reference = rng.dirichlet(np.full(6, 5.0)), rng.dirichlet(np.full(6, 5.0))
    k1 = np.log(policy / reference)
    means = rng.choice(k1, p=policy, size=(20_000, 8)).mean(1)
    assert (means < 0).mean() > 0.01
    for probability in (0.1, 0.01):
        assert (means < np.log(probability) / 8).mean() <= probability


def test_no_findings_without_metrics() -> None:
    assert diagnose_ppo({}, [], PPOSettings(), num_held_out=0, reward=None) == []
