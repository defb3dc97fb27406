"""DPO diagnostics: metrics in, findings out; a healthy run gets no suggested action."""

from typing import Any

import pytest

from align.dpo.collate import length_ratio
from align.dpo.panel import Seen, findings
from align.preference.finding import Finding

CALM = {
    "accuracy_after": 0.8,
    "held_out_loss_before": 0.6931,
    "held_out_loss_after": 0.6,
    "held_out_margin_before": 0.0,
    "held_out_margin_after": 1.0,
    "held_out_accuracy_before": 0.5,
    "held_out_accuracy_after": 0.75,
    "held_out_chosen_logps_before": -1.0,
    "held_out_chosen_logps_after": -1.02,
    "held_out_rejected_logps_before": -1.0,
    "held_out_rejected_logps_after": -1.5,
    "held_out_kl_after": 0.02,
}
LOOP = "I am glad to help you. " * 6


def found(
    replies: Any = (("a b c", "a b d"),), ratio: float = 1.0, likelihood: bool = False, **changed: float
) -> dict[str, Finding]:
    seen = Seen({**CALM, **changed}, length_ratio=ratio, replies=replies, likelihood=likelihood)
    return {finding.name: finding for finding in findings(seen)}


def test_pain_15_a_calm_run_gets_no_advice() -> None:
    calm = found()
    assert calm.keys() == {"learning", "likelihood"}
    assert not any(finding.action for finding in calm.values())
    assert "chosen -0.020, rejected -0.500 nats" in calm["likelihood"].line()


def test_pain_15_chosen_that_falls_is_told_with_what_to_do() -> None:
    finding = found(held_out_chosen_logps_after=-1.3)["likelihood"]
    assert "chosen -0.300" in finding.said and "align.loss={name: rpo}" in finding.action
    assert finding.line().startswith("!!") and finding.record()["warned"] is True
    assert "nll_weight" in found(held_out_chosen_logps_after=-1.3, likelihood=True)["likelihood"].action


def test_pain_15_without_held_out_rows_training_s_own_drift_counts() -> None:
    seen = Seen({"chosen_drift_after": -0.4, "rejected_drift_after": -0.9}, 1.0, [], likelihood=False)
    [finding] = findings(seen)
    assert "chosen -0.400, rejected -0.900" in finding.said and finding.action


WARNED = {
    "unseen pairs": {"held_out_loss_before": 0.6931, "held_out_loss_after": 0.71},
    "learning": {"held_out_margin_after": 0.001, "held_out_accuracy_after": 0.52},
    "distance": {"held_out_kl_after": 2.5},
    "overfit": {"accuracy_after": 0.99, "held_out_accuracy_after": 0.6},
    "saturated": {"accuracy_after": 1.0, "held_out_accuracy_after": 0.99},
    "length": {"ratio": 1.5},
    "repetition": {"replies": [("fine", LOOP)]},
}


@pytest.mark.parametrize("name", WARNED)
def test_pain_15_what_goes_wrong_is_told(name: str) -> None:
    finding = found(**WARNED[name])[name]
    assert finding.action and finding.means, finding


def test_pain_15_longer_replies_are_blamed_on_the_data_where_the_data_are_so() -> None:
    grown = [("one two three", "one two three four five six")]
    assert "learned that longer is better" in found(grown, ratio=1.1)["length"].means
    assert "not because of the data" in found(grown, ratio=0.9)["length"].means
    assert "completion length after/before 2.00" in found(grown)["length"].said


def test_pain_15_one_answer_to_every_prompt_is_repetition() -> None:
    finding = found([("a", "yes"), ("b", "yes"), ("c", "yes")])["repetition"]
    assert "duplicates of another one: 0 → 2" in finding.said
    assert "repetition" not in found([(LOOP, LOOP)]), "it repeated itself before training too"


def test_the_length_ratio_of_groups_counts_best_and_worst() -> None:
    from test_dpo_trainer import grouped

    assert length_ratio(grouped([(2, [6, 3]), (4, [2, 9, 1])])) == pytest.approx((6 + 2) / (3 + 1))
