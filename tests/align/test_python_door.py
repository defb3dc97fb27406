"""The Python door: functions, callbacks, results that load and reply, messages that speak Python."""

import json
from pathlib import Path
from typing import Any

import pytest
from api_settings import ADDITIONS, FAST
from transformers import TrainerCallback

from align import load_recipe, load_tuned, run
from align.cli import main
from finetune.recipe.errors import UserError
from finetune.recipe.python_messages import ArgumentError, command_line_messages, reader_words
from finetune.training.result import Result

ROWS = [{**row, "level": number} for number, row in enumerate(ADDITIONS)]


class Seen(TrainerCallback):
    """Counts the events of a run."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.events.append("log")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("evaluate")


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def finished(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, seen: Seen) -> Result:
    """Return a run with a grader given in Python and a callback."""
    recipe = load_recipe(
        base=str(base_folder),
        data=ROWS,
        out=tmp_path_factory.mktemp("door") / "run",
        graders={"level": lambda completion, level, expected: level + len(expected)},
        settings={**FAST, "evaluate.exact_match": 2, "train.evaluate_every": 1},
    )
    return run(recipe, callbacks=[seen])


def test_callbacks_are_called_and_every_graded_answer_is_kept(finished: Result, seen: Seen) -> None:
    assert seen.events.count("step") == 2 and {"log", "evaluate"} <= set(seen.events)
    lines = (finished.directory / "held_out.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    graded = [entry for entry in entries if entry["evaluation"] == "graders" and entry["when"] == "after"]
    assert len(graded) == 2
    for entry in graded:
        number = int(entry["location"].removeprefix("row ")) - 1
        assert entry["grades"]["level"] == ROWS[number]["level"] + len(ROWS[number]["output"])
        assert entry["expected"] == ROWS[number]["output"]
    exact = [entry["correct"] for entry in entries if entry["evaluation"] == "exact_match"]
    assert len(exact) == 4 and all(isinstance(value, bool) for value in exact)
    places = finished.record["data"]["held_out_rows"]
    assert sum(len(numbers.split(", ")) for numbers in places.values()) in (1, 2)


def test_a_result_loads_and_replies(finished: Result) -> None:
    model, tokenizer = finished.load()
    ids = model.generate(**tokenizer("Add 2 and 2.", return_tensors="pt"), max_new_tokens=3)
    assert ids.shape[1] > 3
    tuned = load_tuned(finished)
    assert set(model.generation_config.eos_token_id) == set(tuned.encoder.stop_ids)
    text = tuned.reply("Add 2 and 2.", max_new_tokens=3)
    assert text == tuned.reply([{"role": "user", "content": "Add 2 and 2."}], max_new_tokens=3)
    assert text == load_tuned(str(finished.directory)).reply("Add 2 and 2.", max_new_tokens=3)


def test_the_recipe_of_such_a_run_asks_for_the_function_again(finished: Result) -> None:
    with pytest.raises(UserError, match="which a recipe file cannot hold"):
        load_recipe(str(finished.directory))
    again = load_recipe(str(finished.directory), graders={"level": lambda completion: 1.0})
    assert again.settings.data.template == finished.record["reload"]["template"]


def test_what_is_no_callback_is_refused(base_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(base=str(base_folder), data=ROWS, out=tmp_path / "run", settings=FAST)
    for wrong in (print, object, {"on_log": print}):
        with pytest.raises(UserError, match=r"callbacks\[0\]: found .*\n.*transformers.TrainerCallback"):
            run(recipe, callbacks=[wrong])  # type: ignore[list-item]
    parallel = load_recipe(base=str(base_folder), data=ROWS, settings={**FAST, "train.num_processes": 2})
    with pytest.raises(UserError, match="train.num_processes: 2, with callbacks"):
        run(parallel, callbacks=[Seen()])
    functions = load_recipe(
        base=str(base_folder),
        data=ROWS,
        graders={"size": lambda completion: len(completion)},
        settings={**FAST, "train.num_processes": 2},
    )
    with pytest.raises(UserError, match="with the function function given in Python"):
        run(functions)


def test_messages_in_python_speak_of_python(finished: Result, base_folder: Path) -> None:
    other = load_recipe(base=str(base_folder), data=ROWS, out=finished.directory, settings=FAST)
    with pytest.raises(UserError) as error:
        run(other)
    text = str(error.value)
    assert f"out={finished.directory}: a run with other settings or data" in text
    assert "force=True to replace that run" in text and "--" not in text
    with pytest.raises(UserError, match=r"data.held_out \(Python\)"):
        load_recipe(base=str(base_folder), data=ROWS, settings={"data.held_out": "no"})


@pytest.mark.parametrize(
    ("arguments", "repair"),
    [
        ({"start": "sft-quickstart"}, "init_from="),
        ({"dataset": ROWS}, "data="),
        ({"adaptor": "lora"}, "did you mean 'adapter'?"),
        ({"learning_rate": 1e-4}, 'settings: {"section.learning_rate": value}'),
    ],
)
def test_an_unknown_argument_is_a_user_error(arguments: dict[str, Any], repair: str) -> None:
    with pytest.raises(ArgumentError) as error:
        load_recipe("quickstart", **arguments)
    assert isinstance(error.value, TypeError) and isinstance(error.value, UserError)
    assert "no such argument" in str(error.value) and repair in str(error.value)


MESSAGES = [
    ("choose another --out, or --force to replace it", "choose another `out=`, or force=True to replace it"),
    ("--out runs/a: a file", "out=runs/a: a file"),
    ("`run(recipe) --force` repeats the run", "`run(recipe, force=True)` repeats the run"),
    ("`llm-align sft x --force` repeats the run", "`llm-align sft x --force` repeats the run"),
    ("offline: --base FOLDER", "offline: base=FOLDER"),
    ("--reward RUN, or rewards.sources=[]", "reward=RUN, or rewards.sources=[]"),
    (
        "the same command with --accept-changed-code resumes",
        "the same call with accept_changed_code=True resumes",
    ),
    (
        "stopped by SIGINT. Run the same command to resume",
        "stopped by SIGINT. Repeat the same call to resume",
    ),
    ("train.epochs (command line): found 'x'", "train.epochs (Python): found 'x'"),
    ("for preferences: llm-align dpo --data ...", "for preferences: llm-align dpo --data ..."),
    ("a model --gpus 2", "a model --gpus 2"),
]


@pytest.mark.parametrize(("command_line", "python"), MESSAGES)
def test_words_of_the_reader(command_line: str, python: str) -> None:
    assert reader_words(command_line) == python
    with command_line_messages():
        assert reader_words(command_line) == command_line


def test_the_command_line_speaks_of_options(
    finished: Result, base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sft", "--base", str(base_folder), "--out", str(finished.directory)]
    monkeypatch.setattr("sys.argv", ["llm-align", *words])
    with pytest.raises(SystemExit):
        main()
    assert f"--out {finished.directory}: " in capsys.readouterr().err
