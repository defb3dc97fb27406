"""DPO diagnostics: metrics in, findings out; a healthy run gets no suggested action."""

from typing import Any

import pytest

from align.dpo.collate import data_length_ratio
from align.dpo.diagnostics import DiagnosticInputs, diagnose_dpo
from finetune.training.findings import Finding

HEALTHY = {
    "rewards/accuracies_after": 0.8,
    "eval/loss_before": 0.6931,
    "eval/loss_after": 0.6,
    "eval/rewards/margins_before": 0.0,
    "eval/rewards/margins_after": 1.0,
    "eval/rewards/accuracies_before": 0.5,
    "eval/rewards/accuracies_after": 0.75,
    "eval/logps/chosen_before": -1.0,
    "eval/logps/chosen_after": -1.02,
    "eval/logps/rejected_before": -1.0,
    "eval/logps/rejected_after": -1.5,
    "eval/objective/kl_per_token_after": 0.02,
}
LOOP = "I am glad to help you. " * 6


def findings_by_name(
    completions: Any = (("a b c", "a b d"),), ratio: float = 1.0, has_nll_term: bool = False, **changed: float
) -> dict[str, Finding]:
    inputs = DiagnosticInputs(
        {**HEALTHY, **changed}, length_ratio=ratio, completions=completions, has_nll_term=has_nll_term
    )
    return {finding.name: finding for finding in diagnose_dpo(inputs)}


def test_pain_15_healthy_run_needs_no_action() -> None:
    healthy = findings_by_name()
    assert healthy.keys() == {"learning", "likelihood"}
    assert not any(finding.action for finding in healthy.values())
    assert "chosen -0.020, rejected -0.500 nats" in healthy["likelihood"].format_line()


def test_pain_15_chosen_logp_drop_suggests_an_action() -> None:
    finding = findings_by_name(**{"eval/logps/chosen_after": -1.3})["likelihood"]
    assert "chosen -0.300" in finding.evidence and "dpo.loss={name: rpo}" in finding.action
    assert finding.format_line().startswith("!!") and finding.record()["warned"] is True
    assert (
        "nll_weight"
        in findings_by_name(**{"eval/logps/chosen_after": -1.3}, has_nll_term=True)["likelihood"].action
    )


def test_pain_15_training_logratios_are_used_without_held_out() -> None:
    inputs = DiagnosticInputs(
        {"logratios/chosen_after": -0.4, "logratios/rejected_after": -0.9}, 1.0, [], has_nll_term=False
    )
    [finding] = diagnose_dpo(inputs)
    assert "chosen -0.400, rejected -0.900" in finding.evidence and finding.action


WARNED = {
    "learning": {"eval/rewards/margins_after": 0.001, "eval/rewards/accuracies_after": 0.52},
    "distance": {"eval/objective/kl_per_token_after": 2.5},
    "overfit": {"rewards/accuracies_after": 0.99, "eval/rewards/accuracies_after": 0.6},
    "saturated": {
        "rewards/accuracies_after": 1.0,
        "eval/rewards/accuracies_after": 0.99,
        "rewards/margins_after": 3.0,
    },
    "length": {"ratio": 1.5},
    "repetition": {"completions": [(f"fine {i}", f"{i} {LOOP}") for i in range(4)]},
}


@pytest.mark.parametrize("name", WARNED)
def test_pain_15_each_problem_has_a_finding(name: str) -> None:
    found = findings_by_name(**WARNED[name])
    assert name in [warned for warned, finding in found.items() if finding.action]
    assert found[name].format_line().startswith(f"!!  {name}")
    assert found[name] != findings_by_name().get(name), "a healthy run has another finding"


def test_signs_of_rounding_errors_are_no_learning() -> None:
    """A learning rate of 1e-6 moves no log-probability, and gives three of four pairs the right sign."""
    unmoved = {"eval/logps/chosen_after": -1.0001, "eval/logps/rejected_after": -1.0002}
    finding = findings_by_name(**unmoved, **{"eval/rewards/margins_after": 1e-5})["learning"]
    assert finding.meaning == NOTHING and RAISE in finding.action


def test_pairs_with_the_right_sign_and_no_margin_are_not_saturated() -> None:
    """A learning rate of 1e-7 gives every pair the right sign, and a margin of 1e-6."""
    changed = {"rewards/accuracies_after": 1.0, "rewards/margins_after": 1e-6}
    assert "saturated" not in findings_by_name(**changed)


MARGINS = {"eval/rewards/margins_before": 1.0}
ACCURACIES = {"eval/rewards/accuracies_before": 0.72}
FALLEN = {"eval/logps/chosen_before": -1.0, "eval/logps/chosen_after": -1.3}
NOTHING, LOWER, RAISE = "almost nothing was learned", "lower train.learning_rate", "raise train.learning_rate"
SHORT = [("one two three four five six", "one")]


@pytest.mark.parametrize(
    ("name", "changed", "meaning", "action"),
    [
        ("learning", MARGINS | {"eval/rewards/margins_after": 1.5}, "prefers chosen over rejected", ""),
        ("learning", MARGINS | ACCURACIES | {"eval/rewards/margins_after": 1.01}, NOTHING, RAISE),
        ("learning", MARGINS | ACCURACIES | {"eval/rewards/margins_after": 0.99}, NOTHING, RAISE),
        ("learning", MARGINS | {"eval/rewards/margins_after": 0.2}, "prefers rejected over chosen", LOWER),
        (
            "learning",
            MARGINS | {"eval/rewards/margins_after": 1.0, "eval/rewards/accuracies_after": 0.2},
            "prefers rejected over chosen",
            LOWER,
        ),
        (
            "likelihood",
            FALLEN | {"eval/logps/rejected_after": -1.1},
            "both became less likely, chosen",
            "rpo",
        ),
        ("likelihood", FALLEN | {"eval/logps/rejected_after": -2.0}, "rejected ones more: prob", "rpo"),
        ("likelihood", FALLEN | {"eval/logps/rejected_after": -0.5}, "and rejected ones more likely", LOWER),
        ("likelihood", {"eval/logps/chosen_after": -0.5}, "as likely as before, or more", ""),
        ("length", {"completions": SHORT, "ratio": 1.0}, "completions grew shorter", "beta"),
        (
            "length",
            {"completions": SHORT, "ratio": 0.7},
            "learned that shorter is better",
            "balance the lengths",
        ),
        ("length", {"ratio": 0.7}, "length alone separates most pairs", "balance the lengths"),
        ("length", {"ratio": 1.5}, "length alone separates most pairs", "balance the lengths"),
    ],
)
def test_the_advice_follows_the_sign_of_the_change(
    name: str, changed: dict[str, Any], meaning: str, action: str
) -> None:
    finding = findings_by_name(**changed)[name]
    assert meaning in finding.meaning and action in finding.action
    assert bool(finding.action) == bool(action)


def test_pain_15_length_growth_is_attributed_to_the_data() -> None:
    grown = [("one two three", "one two three four five six")]
    assert "learned that longer is better" in findings_by_name(grown, ratio=1.1)["length"].meaning
    assert "not because of the data" in findings_by_name(grown, ratio=0.9)["length"].meaning
    assert "completion length after/before 2.00" in findings_by_name(grown)["length"].evidence


def test_pain_15_identical_completions_are_repetition() -> None:
    finding = findings_by_name([("a", "yes"), ("b", "yes"), ("c", "yes")])["repetition"]
    assert "duplicates of another one: 0 → 2" in finding.evidence
    assert "repetition" not in findings_by_name([(LOOP, LOOP)]), "it repeated itself before training too"


def test_data_length_ratio_uses_best_and_worst() -> None:
    from test_dpo_trainer import grouped

    assert data_length_ratio(grouped([(2, [6, 3]), (4, [2, 9, 1])])) == pytest.approx((6 + 2) / (3 + 1))
