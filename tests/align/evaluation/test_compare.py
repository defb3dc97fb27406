"""``compare``: runs and evaluations side by side, the winner, what limits the comparison, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from handmade import HOSTILE, evaluation, graded, share, write_run

from align import compare
from align.cli.commands import cli
from align.evaluation.compare import compare_models
from align.evaluation.models import ComparedModel
from finetune.evaluation.results import save_evaluation
from finetune.recipe.errors import UserError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_runs_with_the_same_held_out_prompts() -> None:
    write_run(Path("runs/sft-a"), correct=share(20))
    write_run(Path("runs/sft-b"), correct=share(60), settings={"learning_rate": 0.01}, losses=(2.0, 0.5))
    comparison = compare("sft-a", "sft-b")
    assert (
        comparison.winner == "B" and "B is better than A: exact match by 40.0 points" in comparison.sentence
    )
    assert comparison.settings == {"train.learning_rate": [0.001, 0.01]}
    assert comparison.held_out == {"loss": [1.0, 0.5]} and comparison.curves == {"loss": "training loss"}
    assert comparison.costs["trained tokens"] == ["1,200", "1,200"]
    # Prompts with other answers and other scores are first.
    first = comparison.quality[0].answers[0]
    assert first.is_different and first.scores == [0.0, 1.0]
    assert [entry.prompt for entry in comparison.samples] == ["sample of prompt"]
    assert json.loads(json.dumps(comparison.record(), allow_nan=False))["pairs"][0]["status"] == "better"


def test_not_decided_says_how_many_prompts_would() -> None:
    write_run(Path("runs/sft-a"), correct=share(20))
    write_run(Path("runs/sft-b"), correct=share(23))
    sentence = compare("sft-a", "sft-b").sentence
    assert sentence.startswith("Not decided between A and B: exact match (+3.0 points, 95 % interval")
    # As in test_verdict: 312, rounded up to two digits.
    assert sentence.endswith("; about 320 more prompts would decide a difference of this size.")


def test_the_best_of_three_beats_each_of_the_others() -> None:
    for name, right in (("a", 20), ("b", 60), ("c", 22)):
        write_run(Path(f"runs/sft-{name}"), correct=share(right), settings={"learning_rate": right / 1000})
    comparison = compare("sft-a", "sft-b", "sft-c")
    assert comparison.winner == "B" and "than each of A, C" in comparison.sentence
    assert len(comparison.pairs) == 3
    undecided = compare("sft-a", "sft-c")
    assert undecided.winner == ""


def test_seeds_of_one_recipe_and_other_held_out_rows_are_recognized() -> None:
    write_run(Path("runs/sft-a"), correct=share(20))
    write_run(Path("runs/sft-b"), correct=share(20), settings={"seed": 1}, prompt="other")
    write_run(Path("runs/sft-c"), correct=share(24), settings={"learning_rate": 0.1})
    comparison = compare("sft-a", "sft-b", "sft-c")
    assert "A, B are runs of one recipe with the seeds 0, 1" in comparison.notes[0]
    # B has no prompt in common with A and C.
    assert [estimate is None for estimate in comparison.quality[0].estimates] == [False, True, False]


def test_five_seeds_of_each_compare_recipes() -> None:
    models = []
    for index, right in enumerate([20, 22, 21, 19, 23, 50, 52, 51, 49, 53]):
        recipe = {"stage": "sft", "train": {"seed": index % 5, "learning_rate": 0.1 if index < 5 else 0.2}}
        suites = {"task": graded("task", share(right))}
        record = {"stage": "sft", "status": "finished"}
        models.append(
            ComparedModel(
                "ABCDEFGHIJ"[index], f"run {index}", Path(f"run{index}"), record, recipe, suites=suites
            )
        )
    comparison = compare_models(models)
    (pair,) = comparison.recipes
    # The smallest two-sided p-value of 252 assignments is 2 / 252.
    assert pair.change.decision is not None
    assert pair.change.decision.difference.value == pytest.approx(0.3)
    assert pair.change.decision.difference.p_value == pytest.approx(2 / 252)
    assert comparison.winner == "FGHIJ" and comparison.sentence.startswith("Recipes, each by the letters")


def test_an_interrupted_run_and_evaluations_of_bases() -> None:
    write_run(Path("runs/sft-a"), status="interrupted", losses=(2.0,))
    save_evaluation(Path("runs/sft-a/evaluation"), evaluation("sft-a", graded("task", share(60))))
    save_evaluation(Path("runs/eval-tiny"), evaluation("tiny", graded("task", share(20))))
    save_evaluation(Path("runs/eval-other"), evaluation("other", graded("task", share(20), fingerprint="x")))
    comparison = compare("runs/sft-a", "tiny", "runs/eval-other")
    assert comparison.winner == "A" and comparison.source == "evaluations"
    assert "A is interrupted at step 1 of 2." in comparison.notes
    assert comparison.quality[0].estimates[2] is None  # other items


def test_runs_of_two_stages_are_compared_by_their_evaluations_only() -> None:
    for stage, right in (("sft", 20), ("dpo", 60)):
        write_run(Path(f"runs/{stage}-a"), stage=stage, correct=share(right))
    with pytest.raises(UserError, match=r"runs of different stages \(dpo, sft\)"):
        compare("sft-a", "dpo-a")
    for stage, right in (("sft", 20), ("dpo", 60)):
        result = evaluation(f"{stage}-a", graded("task", share(right)))
        save_evaluation(Path(f"runs/{stage}-a/evaluation"), result)
    comparison = compare("sft-a", "dpo-a")
    assert comparison.winner == "B" and comparison.curves == {} and comparison.held_out == {}


def test_win_rates_against_other_completions_are_not_compared() -> None:
    models = []
    for letter, opponent in (("A", "base"), ("B", "base"), ("C", "A")):
        suite = graded("judge", share(60), task="preference")
        items = [replace(item, evidence={**item.evidence, "compared_with": opponent}) for item in suite.items]
        folder = Path(letter)
        models.append(ComparedModel(letter, letter, folder, suites={"judge": replace(suite, items=items)}))
    comparison = compare_models(models)
    assert [estimate is None for estimate in comparison.quality[0].estimates] == [False, False, True]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "RUN: none"),
        (["sft-a"], "RUN: only sft-a"),
        (["sft-a", "sft-a"], "sft-a is named twice"),
        (["sft-a", "nope"], "there is no run 'nope'"),
        (["sft-a", "."], "is not a run"),
        (["sft-a", "damaged"], "damaged/run.json: corrupt file"),
        (["runs/eval-a", "runs/eval-b"], "no suite, graded prompt, sample or curve is common"),
    ],
)
def test_bad_input_is_one_message(names: list[str], message: str) -> None:
    write_run(Path("runs/sft-a"))
    Path("damaged").mkdir()
    Path("damaged/run.json").write_text("{")
    save_evaluation(Path("runs/eval-a"), evaluation("a", graded("one", share(20))))
    save_evaluation(Path("runs/eval-b"), evaluation("b", graded("two", share(20))))
    with pytest.raises(UserError) as caught:
        compare(*names)
    (problem,) = caught.value.problems
    assert message in str(problem)


def test_the_command_prints_and_writes_a_page() -> None:
    write_run(Path("runs/sft-a"), correct=share(20), prompt=HOSTILE)
    write_run(Path("runs/sft-b"), correct=share(60), prompt=HOSTILE)
    result = CliRunner().invoke(cli, ["compare", "sft-a", "sft-b", "--html", "c.html"])
    assert result.exit_code == 0 and "B is better than A: exact match by 40.0 points" in result.output
    assert "\x1b" not in result.output
    html = Path("c.html").read_text(encoding="utf-8")
    assert html.count("<svg") == html.count("</svg>") >= 4
    assert "<script" not in html and "<img" not in html and "\x1b" not in html and "\u202e" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "\\x1b[31m\\u202egnp.exe" in html
    as_json = CliRunner().invoke(cli, ["compare", "sft-a", "sft-b", "--json"])
    assert json.loads(as_json.output)["winner"] == "B"
