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
from align.rejection.tuning import RejectionTuning
from finetune.recipe.errors import UserError
from finetune.training.job import Job
from finetune.training.result import Result
from finetune.training.stops import Interrupted

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rejection"))


@pytest.fixture(scope="module")
def whole(folder: Path, base_folder: Path) -> Result:
    """Return an uninterrupted run."""
    judges = {"letters": f"{folder}/mine.py:letters"}
    return run(recipe(folder, base_folder, folder / "whole", evaluate__judges=judges))


def chosen(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "chosen.jsonl").read_text().splitlines()]


def worth(reply: str) -> float:
    space: dict[str, Callable[[str, str], float]] = {}
    exec(PROGRAM, space)
    return space["letters"]("", reply)


def test_what_is_learnt_is_the_best_of_what_was_drawn(whole: Result) -> None:
    lines = chosen(whole.directory)
    assert [line["round"] for line in lines] == [1] * 6 + [2] * 6
    assert len({line["place"] for line in lines[:6]}) == 6 and all(line["n"] == 3 for line in lines)
    for line in lines:
        assert line["reward"] == worth(line["reply"]) >= line["mean"]
        assert line["prompt"].startswith("Add the numbers.")
    rounds = whole.record["rounds"]
    assert rounds["1"]["chosen_reward"] == pytest.approx(sum(line["reward"] for line in lines[:6]) / 6)
    assert rounds["1"]["reward"] == pytest.approx(sum(line["mean"] for line in lines[:6]) / 6)
    assert (rounds["1"]["rows"], rounds["2"]["rows"]) == (6, 12), "earlier rounds are trained on again"


def test_the_policy_comes_to_be_worth_more(whole: Result) -> None:
    metrics = whole.record["metrics"]
    assert metrics["held_out_reward_after"] > metrics["held_out_reward_before"] + 0.1
    assert metrics["held_out_best_before"] > metrics["held_out_reward_before"]
    gold = metrics["held_out_judged_letters_after"]
    assert gold == pytest.approx(metrics["held_out_reward_after"]), "the grader is the reward here"
    assert {"judged_letters_before", "judged_letters_after", "stopped_after"} <= metrics.keys()


def test_the_run_holds_what_its_last_round_saved(whole: Result) -> None:
    last = json.loads((whole.directory / "rounds" / "2" / "run.json").read_text())
    assert whole.record["files"] == last["files"] and last["status"] == "finished"
    assert last["start"]["folder"] == str(whole.directory / "rounds" / "1")
    assert load_tuned(whole.directory).model is not None
    assert load_tuned(whole.directory / "rounds" / "1").model is not None
    assert whole.record["rewards"][0]["name"] == "letters"
    assert [sample.keys() >= {"before", "after"} for sample in whole.samples] == [True, True]


def test_the_curves_go_on_from_round_to_round(whole: Result) -> None:
    steps = [line["step"] for line in whole.metrics]
    assert steps == list(range(11)), "two epochs of 6 rows and of 12, 4 in a step: 4 and 6 steps"
    rewards = {line["step"]: line["held_out_reward"] for line in whole.metrics if "held_out_reward" in line}
    assert list(rewards) == [0, 4, 10]
    page = (whole.directory / "report.html").read_text()
    assert "Rounds" in page and "mean reward of selected" in page and "best of 3" in page
    assert "judged: letters after" in page


def stopped_at(place: str, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal when the run reaches a place for the nth time."""
    count = 0
    owner: Any = {"draw": RejectionTuning, "train": Job}[place]
    name = {"draw": "_write_chosen", "train": "train"}[place]
    plain = getattr(owner, name)

    def counted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(("place", "moment"), [("train", 1), ("train", 2), ("draw", 2)])
def test_a_stopped_run_ends_as_a_whole_one(
    place: str,
    moment: int,
    folder: Path,
    base_folder: Path,
    whole: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judges = {"letters": f"{folder}/mine.py:letters"}
    again = recipe(folder, base_folder, tmp_path / "run", evaluate__judges=judges)
    with monkeypatch.context() as patch:
        stopped_at(place, moment, patch)
        with pytest.raises(Interrupted):
            run(again)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    drawn = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "drawn").iterdir()}
    result = run(again)
    assert result.record["files"] == whole.record["files"]
    assert chosen(result.directory) == chosen(whole.directory)
    later = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "drawn").iterdir()}
    assert drawn.items() <= later.items(), "stored completions are not sampled again"
    assert result.record["rounds"] == whole.record["rounds"]
    assert result.metrics == whole.metrics


def test_damaged_replies_are_told_and_drawn_again(
    folder: Path, base_folder: Path, whole: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = {"letters": f"{folder}/mine.py:letters"}
    shutil.copytree(whole.directory, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    file = tmp_path / "run" / "drawn" / "1-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    result = run(recipe(folder, base_folder, tmp_path / "run", evaluate__judges=judges))
    assert "corrupt file, sampling these completions again" in capsys.readouterr().out
    assert result.record["files"] == whole.record["files"]
    assert chosen(result.directory) == chosen(whole.directory)


def test_a_reward_that_fails_on_an_empty_reply_is_told_before_anything_is_written(
    folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def mean(prompt, completion):\n    return 1 / len(completion)\n")
    with pytest.raises(UserError, match="reward 'mean' on .*prompts.jsonl:1: ZeroDivisionError"):
        run(recipe(folder, base_folder, tmp_path / "run", reward__sources=f"{tmp_path}/mine.py:mean"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_starts_over_forgets_its_rounds(
    folder: Path, base_folder: Path, whole: Result, tmp_path: Path
) -> None:
    judges = {"letters": f"{folder}/mine.py:letters"}
    shutil.copytree(whole.directory, tmp_path / "run")
    (tmp_path / "run" / "drawn" / "9-0000.safetensors").write_text("of another run")
    result = run(recipe(folder, base_folder, tmp_path / "run", evaluate__judges=judges), force=True)
    assert result.record["files"] == whole.record["files"] and result.metrics == whole.metrics
    assert not (tmp_path / "run" / "drawn" / "9-0000.safetensors").exists()


def test_the_last_round_alone_or_the_best_of_all(folder: Path, base_folder: Path, tmp_path: Path) -> None:
    how = {"rejection__memory": False, "rejection__keep": "share", "rejection__share": 0.5}
    result = run(recipe(folder, base_folder, tmp_path / "run", **how))
    lines = chosen(result.directory)
    assert [sum(line["round"] == number for line in lines) for number in (1, 2)] == [9, 9], "half of 18"
    assert result.record["rounds"]["2"]["rows"] == 9
    first = result.record["rounds"]["1"]
    assert first["chosen_reward"] > first["reward"]


@pytest.mark.parametrize("method", ["full", "pissa", "qlora", "layernorm", "prefix"])
def test_every_kind_of_adapter_goes_through_two_rounds(
    method: str, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    small = {"rejection__prompts": 2, "rejection__samples": 2, "train__epochs": 1, "evaluate__samples": 0}
    rate = {"train__learning_rate": 1e-3, "train__warmup": 0, "adapter__method": method}
    result = run(recipe(folder, base_folder, tmp_path / "run", **small, **rate))
    rounds = [json.loads((tmp_path / "run" / "rounds" / n / "run.json").read_text()) for n in ("1", "2")]
    assert rounds[0]["files"] != rounds[1]["files"] == result.record["files"]
    assert load_tuned(result.directory).model is not None


def test_an_adapter_that_goes_on_as_another_has_one_round(
    folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="which continues as 'lora'"):
        recipe(folder, base_folder, tmp_path, adapter__method="loftq")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rejection__unfinished": "drop"}, "none of 18 completions; 0 ended"),
        ({"rejection__above": 1e6}, "completions to train on"),
    ],
)
def test_a_round_without_anything_to_learn_is_told(
    more: dict[str, Any], told: str, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        run(recipe(folder, base_folder, tmp_path / "run", **more))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"rejection__share": 0.5}, "rejection.share"),
        ({"train__evaluate_every": 5}, "train.evaluate_every"),
        ({"data__too_long": "cut"}, "data.too_long"),
        ({"evaluate__exact_match": 5}, "evaluate.exact_match"),
        ({"rejection__samples": 1}, "rejection.samples"),
        ({"reward__sources": []}, "reward.sources"),
        ({"reward__sources": 3}, "reward.sources"),
    ],
)
def test_contradictions_are_told_at_once(
    more: dict[str, Any], where: str, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as told:
        recipe(folder, base_folder, tmp_path, **more)
    assert [problem.where.startswith(where) for problem in told.value.problems] == [True]
