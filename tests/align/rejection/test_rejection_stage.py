"""Stage rejection end to end: sampled and selected completions, and exact resuming."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rejection_runs import PROGRAM, recipe, write

from align import load_tuned, run
from align.rejection import diagnostics
from finetune.distributed.interrupts import Interrupted
from finetune.recipe.errors import UserError
from finetune.training import fit
from finetune.training.result import Result

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rejection"))


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, base_folder: Path) -> Result:
    """Return an uninterrupted run."""
    judges = {"letters": f"{folder}/mine.py:letters"}
    return run(recipe(folder, base_folder, folder / "whole", evaluate__graders=judges))


def selected_entries(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "chosen.jsonl").read_text().splitlines()]


def reward_of(completion: str) -> float:
    namespace: dict[str, Callable[[str, str], float]] = {}
    exec(PROGRAM, namespace)
    return namespace["letters"]("", completion)


def test_selected_completions_are_the_best(uninterrupted: Result) -> None:
    lines = selected_entries(uninterrupted.directory)
    assert [line["round"] for line in lines] == [1] * 6 + [2] * 6
    assert len({line["place"] for line in lines[:6]}) == 6 and all(line["n"] == 3 for line in lines)
    for line in lines:
        assert line["reward"] == reward_of(line["reply"]) >= line["mean"]
        assert line["prompt"].startswith("Add the numbers.")
    rounds = uninterrupted.record["rounds"]
    assert rounds["1"]["objective/chosen_reward"] == pytest.approx(
        sum(line["reward"] for line in lines[:6]) / 6
    )
    assert rounds["1"]["objective/reward"] == pytest.approx(sum(line["mean"] for line in lines[:6]) / 6)
    assert (rounds["1"]["rows"], rounds["2"]["rows"]) == (6, 12), "earlier rounds are trained on again"


def test_reward_increases(folder: Path, base_folder: Path) -> None:
    # An adapter on random weights learns nothing that helps new prompts.
    more = {"adapter__method": "full", "rejection__prompts": 10, "rejection__num_generations": 8}
    metrics = run(recipe(folder, base_folder, folder / "full", **more, train__epochs=4)).record["metrics"]
    assert metrics["eval/objective/reward_after"] > metrics["eval/objective/reward_before"] + 1


def test_metrics_of_the_held_out_prompts(uninterrupted: Result) -> None:
    metrics = uninterrupted.record["metrics"]
    assert metrics["eval/objective/best_of_n_reward_before"] > metrics["eval/objective/reward_before"]
    gold = metrics["eval/gold/letters_after"]
    assert gold == pytest.approx(metrics["eval/objective/reward_after"]), "the grader is the reward here"
    assert {
        "eval/graders/letters_before",
        "eval/graders/letters_after",
        "samples/eos_rate_after",
    } <= metrics.keys()


def test_run_has_the_weights_of_the_last_round(uninterrupted: Result) -> None:
    last = json.loads((uninterrupted.directory / "rounds" / "2" / "run.json").read_text())
    assert uninterrupted.record["files"] == last["files"] and last["status"] == "finished"
    assert last["init_from"]["folder"] == str(uninterrupted.directory / "rounds" / "1")
    assert load_tuned(uninterrupted.directory).model is not None
    assert load_tuned(uninterrupted.directory / "rounds" / "1").model is not None
    assert uninterrupted.record["rewards"][0]["name"] == "letters"
    assert len(uninterrupted.samples) == 2
    assert [one for one in uninterrupted.samples if not one.keys() >= {"before", "after"}] == []


def test_curves_continue_across_rounds(uninterrupted: Result) -> None:
    steps = [line["step"] for line in uninterrupted.metrics]
    assert steps == list(range(11)), "two epochs of 6 rows and of 12, 4 in a step: 4 and 6 steps"
    rates = [line["learning_rate"] for line in uninterrupted.metrics if "learning_rate" in line]
    # One schedule: the second round continues the decay of the first one, and no step has a rate of 0.
    assert len(rates) == 10 and rates[0] == max(rates) and rates[-1] > 0
    assert rates == sorted(rates, reverse=True) and rates[4] < rates[3] < rates[0]
    rewards = {
        line["step"]: line["eval/objective/reward"]
        for line in uninterrupted.metrics
        if "eval/objective/reward" in line
    }
    assert list(rewards) == [0, 4, 10]
    page = (uninterrupted.directory / "report.html").read_text()
    assert "Rounds" in page and "mean reward of selected" in page and "best of 3" in page
    assert "grader: letters after" in page


def interrupt_at(place: str, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal when the run reaches a place for the nth time."""
    count = 0
    owner: Any = {"draw": diagnostics, "train": fit}[place]
    name = {"draw": "write_selected", "train": "fit"}[place]
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(("place", "moment"), [("train", 1), ("train", 2), ("draw", 2)])
def test_resumed_run_equals_uninterrupted_run(
    place: str,
    moment: int,
    folder: Path,
    base_folder: Path,
    uninterrupted: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judges = {"letters": f"{folder}/mine.py:letters"}
    resumed_recipe = recipe(folder, base_folder, tmp_path / "run", evaluate__graders=judges)
    with monkeypatch.context() as patch:
        interrupt_at(place, moment, patch)
        with pytest.raises(Interrupted):
            run(resumed_recipe)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    stored_before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "drawn").iterdir()}
    result = run(resumed_recipe)
    assert result.record["files"] == uninterrupted.record["files"]
    assert selected_entries(result.directory) == selected_entries(uninterrupted.directory)
    stored_after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "drawn").iterdir()}
    assert stored_before.items() <= stored_after.items(), "stored completions are not sampled again"
    assert result.record["rounds"] == uninterrupted.record["rounds"]
    assert result.metrics == uninterrupted.metrics


def test_corrupt_completions_are_reported_and_resampled(
    folder: Path, base_folder: Path, uninterrupted: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = {"letters": f"{folder}/mine.py:letters"}
    shutil.copytree(uninterrupted.directory, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    file = tmp_path / "run" / "drawn" / "1-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    result = run(recipe(folder, base_folder, tmp_path / "run", evaluate__graders=judges))
    assert "corrupt file, sampling these completions again" in capsys.readouterr().out
    assert result.record["files"] == uninterrupted.record["files"]
    assert selected_entries(result.directory) == selected_entries(uninterrupted.directory)


def test_reward_failing_on_empty_completion_is_reported_before_writing(
    folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def mean(prompt, completion):\n    return 1 / len(completion)\n")
    with pytest.raises(UserError, match="reward 'mean' on .*prompts.jsonl:1: ZeroDivisionError"):
        run(recipe(folder, base_folder, tmp_path / "run", rewards__sources=f"{tmp_path}/mine.py:mean"))
    assert not (tmp_path / "run").exists()


def test_force_discards_earlier_rounds(
    folder: Path, base_folder: Path, uninterrupted: Result, tmp_path: Path
) -> None:
    judges = {"letters": f"{folder}/mine.py:letters"}
    shutil.copytree(uninterrupted.directory, tmp_path / "run")
    (tmp_path / "run" / "drawn" / "9-0000.safetensors").write_text("of another run")
    result = run(recipe(folder, base_folder, tmp_path / "run", evaluate__graders=judges), force=True)
    assert result.record["files"] == uninterrupted.record["files"] and result.metrics == uninterrupted.metrics
    assert not (tmp_path / "run" / "drawn" / "9-0000.safetensors").exists()


def test_last_round_only_and_top_fraction(folder: Path, base_folder: Path, tmp_path: Path) -> None:
    overrides = {
        "rejection__accumulate_rounds": False,
        "rejection__keep": "top_fraction",
        "rejection__top_fraction": 0.5,
    }
    result = run(recipe(folder, base_folder, tmp_path / "run", **overrides))
    lines = selected_entries(result.directory)
    assert [sum(line["round"] == number for line in lines) for number in (1, 2)] == [9, 9], "half of 18"
    assert result.record["rounds"]["2"]["rows"] == 9
    first = result.record["rounds"]["1"]
    assert first["objective/chosen_reward"] > first["objective/reward"]


@pytest.mark.parametrize("method", ["full", "pissa", "qlora", "layernorm", "prefix"])
def test_every_adapter_runs_two_rounds(method: str, folder: Path, base_folder: Path, tmp_path: Path) -> None:
    small = {
        "rejection__prompts": 2,
        "rejection__num_generations": 2,
        "train__epochs": 1,
        "evaluate__samples": 0,
    }
    rate = {"train__learning_rate": 1e-3, "train__warmup": 0, "adapter__method": method}
    result = run(recipe(folder, base_folder, tmp_path / "run", **small, **rate))
    rounds = [json.loads((tmp_path / "run" / "rounds" / n / "run.json").read_text()) for n in ("1", "2")]
    assert rounds[0]["files"] != rounds[1]["files"] == result.record["files"]
    assert load_tuned(result.directory).model is not None


def test_adapter_continued_as_another_allows_one_round(
    folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="which continues as 'lora'"):
        recipe(folder, base_folder, tmp_path, adapter__method="loftq")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rejection__truncated": "drop"}, "none of 18 completions; 0 ended"),
        ({"rejection__min_reward": 1e6}, "completions to train on"),
    ],
)
def test_round_without_eligible_completions_is_reported(
    more: dict[str, Any], message: str, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(recipe(folder, base_folder, tmp_path / "run", **more))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"rejection__top_fraction": 0.5}, "rejection.top_fraction"),
        ({"train__evaluate_every": 5}, "train.evaluate_every"),
        ({"data__overflow": "truncate"}, "data.overflow"),
        ({"evaluate__exact_match": 5}, "evaluate.exact_match"),
        ({"rejection__num_generations": 1}, "rejection.num_generations"),
        ({"rewards__sources": []}, "rewards.sources"),
        ({"rewards__sources": 3}, "rewards.sources"),
    ],
)
def test_contradictions_are_reported(
    more: dict[str, Any], where: str, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        recipe(folder, base_folder, tmp_path, **more)
    assert [problem.where.startswith(where) for problem in error.value.problems] == [True]
