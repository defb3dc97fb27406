"""Small samples are said to be small: intervals, changes that are too few to tell, windows at both ends."""

import doctest

import pytest

from align.dpo.diagnostics import DiagnosticInputs, diagnose_dpo
from align.ppo.diagnostics import diagnose_ppo
from align.ppo.settings import PPOSettings
from finetune.evaluation import small_samples
from finetune.evaluation.small_samples import change_interval, describe_sample, is_conclusive
from finetune.training import curve_findings
from finetune.training.curve_findings import end_means
from finetune.training.findings import repetition_finding
from finetune.training.report import run_summary


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


def test_ppo_says_nothing_of_few_prompts() -> None:
    metrics = {"eval/objective/reward_before": 0.2, "eval/objective/reward_after": 0.1}
    few, many = (diagnose_ppo(metrics, [], PPOSettings(), num_held_out=count)[0] for count in (6, 64))
    assert (few.evidence, few.meaning, few.action) == (
        "held-out 0.200 → 0.100 on 6 prompts",
        "too few held-out prompts to tell",
        "",
    )
    assert many.action and "lower reward" in many.meaning


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
