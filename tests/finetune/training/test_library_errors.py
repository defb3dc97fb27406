"""A library's exception is a user error with its cause; an exception of our own code stays as it is."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ROWS, SETTINGS, save_toy
from peft import LoraConfig
from torch import nn

from align.api import load_recipe, run
from align.cli import main
from finetune.recipe.errors import LibraryError, Problem, UserError
from finetune.recipe.python_messages import reader_words
from finetune.training.library_errors import library_errors, run_errors


def translate(action: Any) -> None:
    with library_errors(
        "adapter.method", "'x' does not fit", expected="another", repair="adapter.method=lora"
    ):
        action()


def raise_our_own() -> None:
    raise RuntimeError("ours")


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Outer(nn.Module):
    """A module whose inner layer gets a state of the wrong width."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layers[0](states)


def test_a_library_s_exception_names_module_file_and_remedy() -> None:
    with pytest.raises(LibraryError) as caught:
        translate(lambda: Outer()(torch.ones(1, 3)))
    (problem,) = caught.value.problems
    assert problem.where == "adapter.method"
    assert (
        "'x' does not fit: RuntimeError in layers.0.0 (Linear) (torch/nn/modules/linear.py:" in problem.actual
    )
    assert "mat1 and mat2 shapes cannot be multiplied" in problem.actual
    assert problem.repair == "adapter.method=lora; --traceback prints the library's error"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "test_library_errors.py" in caught.value.cause["traceback"]


def test_only_a_library_s_frame_is_translated() -> None:
    with pytest.raises(RuntimeError, match="^ours$"):
        translate(raise_our_own)
    problem = Problem("data.source", "found", "expected")
    with pytest.raises(UserError) as caught:
        translate(lambda: (_ for _ in ()).throw(UserError(problem)))
    assert caught.value.problems == [problem] and not isinstance(caught.value, LibraryError)
    with pytest.raises(LibraryError, match=r"TypeError \(peft/tuners/lora/config.py:"):
        translate(lambda: LoraConfig(target_parameters="experts"))


def test_the_cause_reaches_another_process() -> None:
    error = LibraryError(Problem("a", "b", "c", "d"), {"traceback": "lines"})
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, LibraryError) and copy.problems == error.problems
    assert copy.cause == {"traceback": "lines"} and str(copy) == str(error)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("falcon", tmp_path_factory.mktemp("falcon"))


def test_a_run_records_the_cause_and_its_folder_stays_usable(falcon: Path, tmp_path: Path) -> None:
    def recipe(adapter: str) -> Any:
        file = tmp_path / "sft.yaml"
        file.write_text("stage: sft\ndata: {source: rows.jsonl}\n", encoding="utf-8")
        out = tmp_path / "run"
        return load_recipe(
            str(file), base=str(falcon), data=ROWS, adapter=adapter, out=out, settings=SETTINGS
        )

    with pytest.raises(LibraryError, match=r"'prefix' does not fit a model of type 'falcon'") as caught:
        run(recipe("prefix"))
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed" and reader_words(record["error"]) == str(caught.value)
    assert record["cause"] == caught.value.cause and "Traceback" in record["cause"]["traceback"]
    # Nothing was trained: the folder is free for the adapter that the message suggests.
    result = run(recipe("lora"))
    assert result.record["status"] == "finished" and "cause" not in result.record


def test_an_error_after_the_first_pass_is_translated_and_the_run_resumes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("stage: sft\ndata: {source: rows.jsonl}\n", encoding="utf-8")
    settings = SETTINGS | {"train.max_steps": 4, "train.checkpoint_every": 2, "data.max_length": 128}
    recipe = load_recipe(str(file), base=str(base_folder), data=ROWS, out=tmp_path / "run", settings=settings)
    step = torch.optim.AdamW.step

    def fail(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        if any(state["step"] >= 2 for state in self.state.values()):
            torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 4))  # no frame of a library
            nn.Linear(4, 4)(torch.ones(1, 3))
        return step(self, *args, **kwargs)

    def fail_in_library(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        if any(state["step"] >= 2 for state in self.state.values()):
            nn.Linear(4, 4)(torch.ones(1, 3))
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(recipe)
        patch.setattr(torch.optim.AdamW, "step", fail_in_library)
        with pytest.raises(LibraryError, match=r"train: the run stopped: RuntimeError") as caught:
            run(recipe)
    assert "the same call resumes from the last checkpoint" in caught.value.problems[0].repair
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed" and record["cause"]["type"] == "RuntimeError"
    result = run(recipe)
    assert result.record["status"] == "finished" and [line["step"] for line in result.metrics] == [1, 2, 3, 4]


def test_errors_of_several_processes_are_left_to_the_launcher() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), run_errors(2):
        Outer()(torch.ones(1, 3))
    with pytest.raises(LibraryError), run_errors(1):
        Outer()(torch.ones(1, 3))


def test_the_command_line_prints_the_traceback_on_request(
    falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    words = ["sft", "--base", str(falcon), "--data", str(rows), "--adapter", "prefix"]
    words += ["--out", str(tmp_path / "run"), "data.held_out=0", "evaluate.samples=0"]
    words += ["data.max_length=64"]
    monkeypatch.setattr(sys, "argv", ["llm-align", *words])
    with pytest.raises(SystemExit) as plain:
        main()
    message = capsys.readouterr().err
    assert plain.value.code == 2 and "Traceback" not in message
    assert "'prefix' does not fit a model of type 'falcon' (FalconForCausalLM)" in message
    monkeypatch.setattr(sys, "argv", ["llm-align", *words, "--traceback"])
    with pytest.raises(SystemExit) as traced:
        main()
    text = capsys.readouterr().err
    assert traced.value.code == 2 and "Traceback (most recent call last)" in text
    assert text.endswith(message)


def test_out_of_memory_suggests_a_smaller_step() -> None:
    with pytest.raises(LibraryError, match="OutOfMemoryError") as caught:
        translate(raise_out_of_memory)
    assert caught.value.problems[0].repair.startswith("train.micro_batch_size=1, ")
