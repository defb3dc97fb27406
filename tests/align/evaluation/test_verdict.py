"""The verdict on two evaluations: sentence, color, losses, advice, what ``--require`` accepts, its record."""

import json
from pathlib import Path

import pytest
from handmade import evaluation, graded, share, texts, write_run

from align.evaluation.advice import TrainedRun
from align.evaluation.verdict import check_required, make_verdict
from finetune.evaluation.sequential import Look
from finetune.recipe.errors import CheckFailedError

BASE = evaluation("base", graded("task", share(20)), graded("skills", share(80), purpose="retention"))


def after(task: int, skills: int) -> object:
    return evaluation(
        "run", graded("task", share(task)), graded("skills", share(skills), purpose="retention")
    )


@pytest.mark.parametrize(
    ("task", "skills", "status", "color", "sentence"),
    [
        # 20 items of 100 gained, none lost: exact McNemar p = 2 * 0.5^20.
        (40, 80, "better", "green", "Better at task by 20.0 points (95 % interval"),
        (40, 60, "better", "amber", "points (95 % interval"),
        (5, 80, "worse", "red", "Worse at task by 15.0 points (95 % interval"),
        # 3 gained: p = 2 * 0.5^3 = 0.25.
        (23, 80, "not shown", "gray", "No difference shown at task (+3.0 points, 95 % interval"),
        (23, 60, "not shown", "red", "but worse at skills by 20.0 points ("),
    ],
)
def test_status_color_and_sentence(task: int, skills: int, status: str, color: str, sentence: str) -> None:
    verdict = make_verdict(BASE, after(task, skills))
    assert (verdict.status, verdict.color) == (status, color)
    assert sentence in verdict.sentence and verdict.sentence.endswith(".")
    assert ("worse at skills" in verdict.sentence) == (skills == 60)


def test_no_wrong_claim_where_nothing_differs() -> None:
    verdict = make_verdict(BASE, BASE)
    assert (verdict.status, verdict.losses) == ("not shown", [])
    assert "No loss shown on 1 suite" in verdict.forgotten


def test_the_number_of_suites_is_corrected_within_task_and_within_the_others() -> None:
    # 7 of 7 changed items gained: p = 2 / 2^7 = 0.016, shown alone; Holm multiplies it by 4 suites.
    names = [f"task {number}" for number in range(4)]
    before = [graded(name, share(20)) for name in names]
    later = [graded(names[0], share(27)), *(graded(name, share(20)) for name in names[1:])]
    kept = [graded(name, share(20), purpose="retention") for name in ("a", "b", "c")]
    assert make_verdict(evaluation("b", before[0]), evaluation("r", later[0])).status == "better"
    assert make_verdict(evaluation("b", *before), evaluation("r", *later)).status == "not shown"
    both = make_verdict(evaluation("b", before[0], *kept), evaluation("r", later[0], *kept))
    assert both.status == "better"


def test_a_change_of_bits_per_byte_below_one_percent_is_no_loss() -> None:
    base = [1.0 + number / 100 for number in range(40)]
    verdicts = {}
    for factor in (1.005, 1.05):
        later = evaluation("r", graded("task", share(20)), texts("text", [bits * factor for bits in base]))
        verdicts[factor] = make_verdict(
            evaluation("b", graded("task", share(20)), texts("text", base)), later
        )
    # Every text became worse: both are significant, and the metric is better where it is lower.
    assert [verdict.changes[1].status for verdict in verdicts.values()] == ["worse", "worse"]
    assert [len(verdict.losses) for verdict in verdicts.values()] == [0, 1]
    assert "bits per byte" in verdicts[1.05].sentence and verdicts[1.05].color == "red"


def test_other_items_are_not_compared() -> None:
    later = evaluation("run", graded("task", share(90), fingerprint="other"))
    verdict = make_verdict(BASE, later)
    assert verdict.status == "not compared" and verdict.only_one == ["skills"]
    assert "the items or the settings of the suite differ" in verdict.sentence
    assert "same suites" in verdict.action and not verdict.meets("not-worse")


@pytest.mark.parametrize(
    ("layout", "status", "text"),
    [
        # A stereotype rate of 60 % is 10 points from its best, 50 %; one of 45 % is 5 points from it.
        ("crows_pairs", "not shown", "\u22125.0 points"),
        ("anthropic_evals", "", "neither a higher nor a lower value is better"),
    ],
)
def test_a_metric_whose_best_value_is_in_between(layout: str, status: str, text: str) -> None:
    before, later = (graded("bias", share(count), purpose="safety", layout=layout) for count in (60, 45))
    (change,) = make_verdict(evaluation("b", before), evaluation("r", later)).changes
    assert change.status == status
    assert text in (change.difference_text if status else change.reason)


def test_a_preference_against_the_other_model_is_compared_with_even() -> None:
    compared = graded("judge", [1.0] * 70 + [0.5] * 10 + [0.0] * 20, task="preference")
    verdict = make_verdict(evaluation("base"), evaluation("run", compared))
    # Win rate 0.75, even is 0.5.
    assert verdict.changes[0].decision is not None
    assert verdict.changes[0].decision.difference.value == pytest.approx(0.25)
    assert verdict.status == "better"


def test_a_sequential_comparison_decides_by_its_own_interval() -> None:
    # 6 gained of 100: McNemar p = 2 / 2^6 = 0.03 at a fixed size, which is not valid after several looks.
    assert make_verdict(BASE, after(26, 80)).status == "better"
    for low, status in ((-0.02, "not shown"), (0.01, "better")):
        verdict = make_verdict(BASE, after(26, 80), looks={"task": Look(48, 0.06, low, 0.14)})
        assert verdict.status == status and f"{100 * abs(low):.1f} to" in verdict.sentence
        assert json.loads(json.dumps(verdict.record(), allow_nan=False))["suites"][0]["p_value"] is None


def test_require() -> None:
    better, lost, unsure = (make_verdict(BASE, after(*counts)) for counts in ((40, 80), (40, 60), (23, 80)))
    assert [v.meets("better") for v in (better, lost, unsure)] == [True, True, False]
    assert [v.meets("not-worse") for v in (better, lost, unsure)] == [True, False, True]
    with pytest.raises(CheckFailedError) as caught:
        check_required(lost, ["better", "not-worse"])
    assert [problem.where for problem in caught.value.problems] == ["--require not-worse"]
    assert lost.sentence in str(caught.value)


def test_advice_names_what_the_numbers_support(tmp_path: Path) -> None:
    run = TrainedRun.of(write_run(tmp_path / "run", settings={"epochs": 3.0, "learning_rate": 0.001}))
    lost = make_verdict(BASE, after(40, 60), run=run).action
    assert "fewer train.epochs (now 3)" in lost and "train.learning_rate (now 0.001)" in lost
    assert "llm-align merge" in make_verdict(BASE, after(40, 80), run=run).action
    # Bonett and Price: (4/102 + 1/102 - (3/102)^2) / 102 = 0.000472; 100 (2.8^2 0.000472 / 0.03^2 - 1) = 312.
    few = make_verdict(BASE, after(23, 80)).action
    assert few == "About 320 more prompts of task would show a difference of +3.0 points, if it is real."
    # Nothing differs: no number of prompts is advised.
    assert "Change the training" in make_verdict(BASE, BASE).action
    record = json.loads((run.folder / "run.json").read_text())
    finding = {"name": "held-out loss", "evidence": "best at step 1", "action": "train.max_steps=1"}
    record["diagnostics"] = [{**finding, "warned": True}]
    (run.folder / "run.json").write_text(json.dumps(record))
    assert "train.max_steps=1" in make_verdict(BASE, after(40, 60), run=TrainedRun.of(run.folder)).action


def test_the_record_is_json_with_numbers_and_texts() -> None:
    record = json.loads(json.dumps(make_verdict(BASE, after(40, 60)).record(), allow_nan=False))
    task, skills = record["suites"]
    assert task["values_text"] == "20.0 % → 40.0 %" and task["difference_text"] == "+20.0 points"
    assert (task["num_items"], task["num_changed"], task["difference"]) == (100, 20, pytest.approx(0.2))
    assert task["bar"]["low"] > 50 > skills["bar"]["high"]  # better is to the right of the middle
    assert (record["label"], skills["tone"]) == ("better, with losses", "bad")
