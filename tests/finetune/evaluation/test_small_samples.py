"""Small samples are said to be small: intervals, changes that are too few to tell, windows at both ends."""

import doctest
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.dpo.diagnostics import DiagnosticInputs, diagnose_dpo
from align.reward.diagnostics import diagnose_reward
from align.rl.reward_finding import reward_finding
from finetune.evaluation import small_samples
from finetune.evaluation.small_samples import (
    MeanChange,
    change_interval,
    describe_sample,
    is_conclusive,
    paired_change,
)
from finetune.recipe.recipe import read_recipe
from finetune.training import curve_findings
from finetune.training.curve_findings import end_means
from finetune.training.findings import repetition_finding
from finetune.training.held_out_file import reward_change, write_graded
from finetune.training.report import run_summary
from finetune.training.run_directory import RunDirectory


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(small_samples).failed == doctest.testmod(curve_findings).failed == 0


def test_the_interval_of_a_change_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10 (without continuity correction): (a) 56/70 against 48/80; here n is
    # the same on both sides, so that the published 9/10 against 3/10 (b) is the case.
    assert change_interval(0.3, 0.9, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert change_interval(0.0, 1.0, 10)[0] > 0.6


@pytest.mark.parametrize(
    ("before", "after", "count", "conclusive"),
    [
        (0.5, 0.75, 4, False),
        (0.0, 1.0, 4, True),
        (0.1, 0.2, 40, False),
        (0.1, 0.5, 40, True),
        (0.5, 0.6, 256, True),
        (0.9, 0.9, 1000, False),
        (0.0, 1.0, 1, False),
    ],
)
def test_what_a_sample_can_tell(before: float, after: float, count: int, conclusive: bool) -> None:
    assert is_conclusive(before, after, count) == conclusive == is_conclusive(after, before, count)
    assert describe_sample(before, after, count).endswith("too few to tell") == (
        not conclusive and before != after
    )


def dpo_learning(before: float, after: float, count: int) -> tuple[str, str]:
    metrics = {
        "eval/rewards/margins_before": 0.0,
        "eval/rewards/margins_after": 0.3,
        "eval/rewards/accuracies_before": before,
        "eval/rewards/accuracies_after": after,
    }
    inputs = DiagnosticInputs(metrics, 1.0, [], has_nll_term=False, num_held_out=count)
    [finding] = diagnose_dpo(inputs)
    return finding.evidence, finding.meaning


def test_dpo_says_nothing_of_four_held_out_pairs() -> None:
    evidence, meaning = dpo_learning(0.5, 0.75, 4)
    assert evidence == "margin 0.000 → 0.300, accuracy 50% → 75% on 4 cases: 95 % interval 30 % to 95 %"
    assert meaning == "too few held-out pairs to tell whether chosen completions gained"
    gained = "the policy prefers chosen over rejected completions more than before"
    assert dpo_learning(0.0, 1.0, 4)[1] == dpo_learning(0.5, 0.6, 256)[1] == gained


def test_a_gap_that_chance_explains_is_no_overfitting() -> None:
    metrics = {"rewards/accuracies_after": 0.95, "eval/rewards/accuracies_after": 0.75}
    names = [
        [finding.name for finding in diagnose_dpo(DiagnosticInputs(metrics, 1.0, [], False, count))]
        for count in (4, 256)
    ]
    assert names == [[], ["overfit"]]


def change_of(gain: float, count: int, *, scale: float = 1.0) -> MeanChange:
    """Return a change over cases whose differences have a standard deviation of 1."""
    random = np.random.default_rng(0)
    before, noise = random.normal(size=count), random.normal(size=count)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    return paired_change(list(scale * before), list(scale * (before + gain + noise)))


def test_the_interval_of_a_paired_change() -> None:
    """1.96 / sqrt(n) for differences of standard deviation 1; it covers no gain in 95 % of samples."""
    change = change_of(0.5, 100)
    assert change.half_width == pytest.approx(0.19600, abs=1e-5) and change.gain == pytest.approx(0.5)
    random = np.random.default_rng(1)
    samples = [random.normal(size=(2, 40)) for _ in range(2000)]
    false_alarms = [paired_change(list(before), list(after)).is_conclusive for before, after in samples]
    assert np.mean(false_alarms) == pytest.approx(0.05, abs=0.02)


GAINED, LOST = "the policy earns a higher reward", "the policy earns a lower reward than before"
FEW, NO_CHANGE = "too few held-out prompts to tell", "no change that chance does not explain"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    ("gain", "count", "meaning", "action"),
    [
        (0.5, 64, GAINED, ""),
        (-0.5, 64, LOST, "lower train.learning_rate"),
        (0.1, 64, NO_CHANGE, "act"),
        (-0.1, 64, NO_CHANGE, "act"),
        (0.1, 1000, GAINED, ""),
        (-0.3, 24, NO_CHANGE, "act"),
        (2.0, 6, FEW, ""),
        (-2.0, 1, FEW, ""),
    ],
)
def test_the_finding_on_the_reward_does_not_depend_on_its_scale(
    gain: float, count: int, meaning: str, action: str, scale: float
) -> None:
    change = change_of(gain, count, scale=scale) if count > 1 else paired_change([2 * scale], [0.0])
    finding = reward_finding(change, raise_gain="act")
    assert (finding.meaning, finding.action) == (meaning, action)
    assert f"on {count} prompt" in finding.evidence


def test_a_wide_interval_is_no_reason_to_raise_the_rate() -> None:
    """Differences of standard deviation 4 on 24 prompts: half of the interval is 1.6 deviations before."""
    change = change_of(0.0, 24)
    wide = replace(change, half_width=4 * change.half_width, after=change.before - 1.0)
    assert reward_finding(wide, raise_gain="act").meaning == FEW


def test_equal_rewards_before_are_no_division_by_zero() -> None:
    assert reward_finding(paired_change([1.0] * 30, [1.0] * 30), raise_gain="act").meaning == NO_CHANGE
    assert reward_finding(paired_change([1.0] * 30, [2.0] * 30), raise_gain="act").meaning == GAINED


@pytest.mark.parametrize(
    ("accuracy", "count", "meaning", "action"),
    [
        (0.7, 100, "better than chance", ""),
        (0.6, 24, "too few held-out comparisons to tell it from chance", ""),
        (0.5, 24, "too few held-out comparisons to tell it from chance", ""),
        (0.51, 400, "no better than chance", "raise train.learning_rate, train longer"),
        (0.3, 100, "no better than chance", "raise train.learning_rate, train longer"),
    ],
)
def test_a_reward_model_against_chance(accuracy: float, count: int, meaning: str, action: str) -> None:
    [finding] = diagnose_reward({"eval/rewards/accuracies_after": accuracy}, count)
    learned = {"eval/rewards/accuracies_after": accuracy, "rewards/accuracies_after": 0.9}
    is_exchanged = "exchanged" in diagnose_reward(learned, count)[0].action
    assert is_exchanged == (accuracy < 0.4)
    assert finding.meaning == meaning and action in finding.action and bool(action) == bool(finding.action)
    assert diagnose_reward({}, count) == [] == diagnose_reward({"eval/rewards/accuracies_after": 1.0}, 0)


def test_a_prompt_counts_with_the_mean_of_its_completions(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, read_recipe("sft", "quickstart"), "")
    rewards = {"before": [0, 2, 4, 4], "after": [3, 3, 4, 4]}
    for when, values in rewards.items():
        entries = [{"location": f"row {i // 2}", "reward": value} for i, value in enumerate(values)]
        write_graded(run, "rewards", when, entries)  # type: ignore[arg-type]
    write_graded(run, "graders", "after", [{"location": "row 9"}])
    change = reward_change(run)
    assert change is not None and (change.before, change.after, change.count) == (2.5, 3.5, 2)


def test_one_repeating_completion_of_four_is_too_few() -> None:
    loop = "I am glad to help you. " * 6
    one = [("a b", loop), ("c d", "e f"), ("g h", "i j"), ("k l", "m n")]
    assert repetition_finding(one, "act").meaning.startswith("too few completions to tell")  # type: ignore[union-attr]
    all_of_them = [(before, f"{index} {loop}") for index, (before, _) in enumerate(one)]
    assert repetition_finding(all_of_them, "act").action == "act"  # type: ignore[union-attr]


def test_the_summary_names_windows_and_samples() -> None:
    record = {
        "parameters": {"trained": 1, "total": 2},
        "seconds": {},
        "peak_memory_bytes": 0,
        "window": 3,
        "cases": {"eval/exact_match": 40, "eval/loss": 40},
        "metrics": {
            **{"loss_before": 2.0, "loss_after": 1.0, "eval/loss_before": 2.0, "eval/loss_after": 1.0},
            **{"eval/exact_match_before": 0.1, "eval/exact_match_after": 0.2},
        },
    }
    labels = {"loss": ("training loss", ".1f"), "eval/loss": ("held-out loss", ".1f")}
    summary = run_summary(record, labels | {"eval/exact_match": ("exact match", ".0%")})
    assert summary["training loss"] == "2.0 → 1.0 (mean of the first and the last 3 log entries)"
    assert summary["held-out loss"] == "2.0 → 1.0"
    sample = "40 cases: 95 % interval 10 % to 35 %, too few to tell"
    assert summary["exact match"] == f"10% → 20% ({sample})"


def test_both_ends_of_a_curve_have_the_same_window() -> None:
    assert end_means([4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.0]) == (3.0, 0.5)
    assert end_means([3.0, 1.0]) == (3.0, 1.0)
