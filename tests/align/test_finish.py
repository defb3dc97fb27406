"""`llm-align finish`: an interrupted run becomes a finished one at its last checkpoint, in every stage."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import TrainerCallback

from align import finish, load_recipe, load_tuned, run
from align.cli import cli
from finetune.distributed.interrupts import Interrupted
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import find_run
from finetune.training.result import Result

SMALL: dict[str, Any] = {
    "model.base": "tiny",
    "model.init_from": None,
    "model.precision": "float32",
    "data.held_out": 3,
    "train.max_steps": 4,
    "train.batch_size": 4,
    "train.micro_batch_size": 2,
    "train.checkpoint_every": 1,
    "evaluate.samples": 1,
    "evaluate.exact_match": 0,
    "evaluate.max_new_tokens": 4,
}
DRAWN: dict[str, Any] = {
    "sampling.max_new_tokens": 4,
    "sampling.num_generations": 2,
    "evaluate.graders": {},
    "evaluate.retention": None,
}
REWARD = "def short(prompt, completion):\n    return -len(completion)\n"


class StopAt(TrainerCallback):
    """Sends Ctrl-C at a step, or at the start of a round."""

    def __init__(self, step: int, *, start: int = 1) -> None:
        self.step, self.start, self.starts = step, start, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.starts += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the beginning of the step: it is finished, and saved.
        if state.global_step + 1 == self.step and self.starts == self.start:
            os.kill(os.getpid(), signal.SIGINT)


def first_rows(stage: str, folder: Path) -> Path:
    """Return a file with the first rows of the quickstart's data."""
    source = Path(str(load_recipe("quickstart", stage=stage).settings.data.source))
    if stage == "pretrain":
        return PROJECT / source
    file = folder / source.name
    file.write_text("".join((PROJECT / source).read_text().splitlines(keepends=True)[:24]))
    return file


def make(stage: str, folder: Path, **more: Any) -> Recipe:
    settings = SMALL | {"data.source": str(first_rows(stage, folder))}
    if stage in ("ppo", "grpo", "rloo", "rejection"):
        (folder / "rule.py").write_text(REWARD)
        settings |= DRAWN | {"rewards.sources": f"{folder / 'rule.py'}:short"}
    if stage == "pretrain":
        settings |= {"data.held_out": 0}  # one document
    if stage == "ppo":
        settings |= {"ppo.rollout_size": 4}
        del settings["sampling.num_generations"]
    if stage == "rejection":
        del settings["sampling.num_generations"]
        settings |= {
            "rejection.rounds": 2,
            "rejection.prompts": 8,
            "rejection.num_generations": 2,
            "rejection.truncated": "train",
        }
        settings |= {"train.max_steps": None, "rejection.keep": "best_of_n", "rejection.top_fraction": None}
    return load_recipe("quickstart", stage=stage, out=folder / "run", settings=settings | more)


def interrupted(recipe: Recipe, step: int = 2, *, start: int = 1) -> Path:
    with pytest.raises(Interrupted):
        run(recipe, callbacks=[StopAt(step, start=start)])
    assert recipe.out is not None
    assert json.loads((recipe.out / "run.json").read_text())["status"] == "interrupted"
    return recipe.out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = [file for file in folder.glob("*.safetensors") if "model" in file.name]
    # PPO's checkpoint has policy and value model, by the names of both.
    return {
        name.removeprefix("policy.").replace(".default", ""): value for name, value in load_file(file).items()
    }


def assert_finished(result: Result, recipe: Recipe) -> None:
    record, folder = result.record, result.directory
    assert record["status"] == "finished" and record["finished_early"] == {"at": 2, "of": 4, "unit": "step"}
    assert record["steps"] == 2 and record["summary"]["steps"] == "2 of 4, finished early"
    assert max(entry["step"] for entry in result.metrics) == 2
    saved, checkpoint = weights(result.adapter), weights(folder / "checkpoints" / "checkpoint-2")
    shared = saved.keys() & checkpoint.keys()
    assert shared and all(torch.equal(saved[name], checkpoint[name]) for name in shared)
    assert any(key.endswith("_after") for key in record["metrics"])
    assert (folder / "report.html").is_file() and "training" not in record["summary"]
    # The same command and the same call return at once.
    assert run(recipe).record["finished"] == record["finished"]
    assert finish(result).record["finished"] == record["finished"]


STAGES = ["sft"]
SLOW_STAGES = ["dpo", "ppo", "pretrain", "reward", "kto", "grpo", "rloo", "chain_of_hindsight"]


@pytest.mark.parametrize(
    "stage", [*STAGES, *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW_STAGES)]
)
def test_a_run_is_finished_at_its_last_checkpoint(stage: str, tmp_path: Path) -> None:
    recipe = make(stage, tmp_path)
    folder = interrupted(recipe)
    assert_finished(finish(folder), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "adalora", "prompt", "adamix", "lora_plus"])
def test_adapters_with_states_of_their_own(adapter: str, tmp_path: Path) -> None:
    recipe = make("sft", tmp_path, **{"adapter.method": adapter})
    assert_finished(finish(interrupted(recipe)), recipe)


@pytest.mark.slow
def test_rejection_sampling_ends_with_its_last_finished_round(tmp_path: Path) -> None:
    recipe = make("rejection", tmp_path)
    folder = interrupted(recipe, 1, start=1)
    with pytest.raises(UserError, match="no round is finished"):
        finish(folder)
    interrupted(recipe, 1, start=2)
    result = finish(folder)
    assert result.record["finished_early"] == {"at": 1, "of": 2, "unit": "round"}
    first, last = weights(folder / "rounds" / "1" / "adapter"), weights(result.adapter)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert result.record["summary"]["rounds"] == "1 of 2, finished early"


@pytest.mark.slow
def test_the_command_says_what_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make("sft", tmp_path)
    folder = interrupted(recipe)
    done = CliRunner().invoke(cli, ["finish", str(folder), "--json"], catch_exceptions=False)
    printed = json.loads(done.stdout)
    assert printed["finished_early"] == {"at": 2, "of": 4, "unit": "step"} and printed["steps"] == 2
    assert f"llm-align sft {folder} --from {folder}` trains on" in " ".join(done.stderr.split())
    again = CliRunner().invoke(cli, ["sft", str(folder)], catch_exceptions=False)
    assert "finished early, at step 2 of 4" in again.output and "2 of 4, finished early" in again.output


@pytest.mark.slow
def test_the_rest_of_the_schedule_can_be_trained(tmp_path: Path) -> None:
    """A run that counts epochs goes on with the number of steps that it would have had."""
    by_epochs = {"train.max_steps": None, "train.epochs": 0.8}
    recipe = make("sft", tmp_path, **by_epochs)
    complete = run(replace(recipe, out=tmp_path / "complete"))
    result = finish(interrupted(recipe))
    total = result.record["finished_early"]["of"]
    assert complete.record["steps"] == total > 2
    rest = run(load_recipe(str(result.directory), settings={"train.max_steps": total}))
    assert rest.directory == result.directory and "finished_early" not in rest.record
    assert rest.record["files"] == complete.record["files"]
    assert rest.record["metrics"]["eval/loss_after"] == complete.record["metrics"]["eval/loss_after"]


def test_what_cannot_be_finished_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make("sft", tmp_path)
    folder = interrupted(recipe)
    with pytest.raises(UserError, match="a checkpoint(?s:.*)llm-align finish"):
        finish(folder / "checkpoints" / "checkpoint-2")
    record = json.loads((folder / "run.json").read_text())
    changed = record | {"digest": "0" * 8}
    (folder / "run.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="another input has changed since it started"):
        finish(folder)
    (folder / "run.json").write_text(json.dumps(record))
    checkpoints = sorted((folder / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        (checkpoint / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no valid checkpoint: .*optimizer.pt: checksum mismatch"):
        finish(folder)
    assert sorted((folder / "checkpoints").iterdir()) == checkpoints, "nothing is deleted"
    for checkpoint in checkpoints:
        (checkpoint / "checksums.json").unlink()
    with pytest.raises(UserError, match="a run with status '.*' and no checkpoint"):
        finish(folder)
    with pytest.raises(UserError, match="there is no run 'other'"):
        finish("other")


def test_an_interrupted_full_fine_tuning_is_used_by_its_name(tmp_path: Path) -> None:
    recipe = make("sft", tmp_path, **{"adapter.method": "full"})
    folder = interrupted(recipe)
    tuned = load_tuned(folder)
    saved = weights(folder / "checkpoints" / "checkpoint-2")
    loaded = dict(tuned.model.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in saved.items() if name in loaded)
    assert isinstance(tuned.reply("2 + 2", max_new_tokens=4), str)
    child = load_recipe(
        "quickstart",
        stage="sft",
        init_from=folder,
        out=tmp_path / "child",
        settings={
            "train.max_steps": 1,
            "train.batch_size": 2,
            "evaluate.samples": 0,
            "evaluate.exact_match": 0,
            "data.held_out": 0,
            "adapter.method": "lora",
        },
    )
    assert child.settings.model.base == str(find_run(str(folder))[0])
    assert run(child).record["init_from"]["files"].keys() == {"model.safetensors"}
