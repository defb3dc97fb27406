"""Names on the command line: a finished run by its name or a prefix, and a recipe as STAGE/RECIPE."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align import cli, load_recipe, load_reward, load_tuned
from finetune.recipe.errors import UserError
from finetune.recipe.runs import FORMAT

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Return a function from arguments to exit status, stdout and stderr, in a folder with two runs."""
    monkeypatch.chdir(tmp_path)
    for name, day in {"sft-quickstart-11111111": 1, "sft-quickstart-22222222": 2}.items():
        record = {"format": FORMAT, "status": "finished", "stage": "sft", "recipe": "quickstart"}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(
            json.dumps(record | {"digest": name[-8:], "reload": {}, "finished": f"2026-01-0{day}"})
        )

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as exit_error:
            status = int(exit_error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


NEWEST = Path("runs/sft-quickstart-22222222")
LOADERS = {
    "chat": ("align.cli.runs.generate_once", ("--prompt", "a")),
    "merge": ("finetune.training.merge.merge_run", ()),
    "score": ("align.cli.runs.score_and_print", ("rows.jsonl",)),
}


@pytest.mark.parametrize("verb", LOADERS)
def test_a_verb_takes_a_run_by_name(call: Call, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    loader, words = LOADERS[verb]
    given: list[Path] = []
    monkeypatch.setattr(loader, lambda run, *_, **__: given.append(run) or "")
    for name in ("sft-quickstart-11111111", "runs/sft-quickstart-11111111"):
        assert call(verb, name, *words)[0::2] == (0, "")
    status, _, err = call(verb, "sft-quickstart", *words)
    assert (status, err) == (
        0,
        f"'sft-quickstart' matches 2 finished runs; using the newest: {NEWEST}\n",
    )
    assert given == [Path("runs/sft-quickstart-11111111")] * 2 + [NEWEST]
    status, _, err = call(verb, "sft-quickstert", *words)
    assert status == 2 and "RUN: there is no run 'sft-quickstert'" in err and "stage/recipe" not in err


def test_python_takes_a_run_by_name(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.training.loaded_model.load_for_generation", lambda run: run)
    monkeypatch.setattr("align.reward.scorer.load_reward_model", lambda run: run)
    assert load_tuned("sft-quickstart") == load_reward("runs/sft-quickstart") == NEWEST
    assert load_tuned(NEWEST.resolve()) == NEWEST.resolve()
    with pytest.raises(UserError, match="there is no run 'dpo-quickstart'"):
        load_tuned("dpo-quickstart")


@pytest.mark.parametrize("verb", ["show", "plan"])
def test_the_stage_may_stand_before_the_recipe(call: Call, verb: str) -> None:
    def answer(*words: str) -> dict[str, Any]:
        status, out, _ = call(verb, *words, "train.epochs=2", "--json")
        assert status == 0
        found: dict[str, Any] = json.loads(out)
        for measured in ("free", "available"):  # they differ from call to call
            found.get("device", {}).pop(measured, None)
        return found

    expected = answer("quickstart", "--stage", "dpo")
    assert expected["stage"] == "dpo"
    assert answer("dpo/quickstart") == answer("dpo/quickstart", "--stage", "dpo") == expected
    status, _, err = call(verb, "dpo/quickstart", "--stage", "sft")
    assert status == 2 and "dpo/quickstart: a recipe of stage dpo" in err
    assert "repair:   llm-align dpo quickstart" in err


def test_a_verb_takes_its_own_stage_s_recipes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    monkeypatch.setattr("align.cli.stage_commands._run_stage", lambda recipe, **_: names.append(recipe.name))
    assert call("coh", "chain-of-hindsight/quickstart")[0] == 0 and names == ["quickstart"]
    status, _, err = call("sft", "coh/quickstart")
    assert status == 2 and "expected: a recipe of stage sft" in err
    status, _, err = call("sft", "dpo/nowhere.yaml")
    assert status == 2 and "dpo/nowhere.yaml: no such file" in err


RECIPES = [
    ("alpaca", "sft", "alpaca"),
    ("quickstart", "sft", "quickstart"),  # of many stages: the default stage's
    ("ultrafeedback", "dpo", "ultrafeedback"),  # of one stage
    ("dpo/hh", "dpo", "hh"),
    ("coh/hh", "chain_of_hindsight", "hh"),
    ("chain-of-hindsight", "chain_of_hindsight", "quickstart"),  # a stage's default recipe
    ("ppo/default", "ppo", "quickstart"),
    ("own.yaml", "reward", "own"),  # the file's own stage
    ("x=1/own.yaml", "reward", "own"),
    ("plain.yaml", "sft", "plain"),
    ("runs/dpo-old-33333333", "dpo", "old"),
    ("dpo-old-33333333", "dpo", "old"),
    ("dpo-old", "dpo", "old"),
    ("runs/dpo-old-33333333/recipe.yaml", "dpo", "old"),
]


@pytest.fixture
def recipes(tmp_path: Path) -> None:
    """Write recipes and a run into the working directory."""
    for name, stage in {"own.yaml": "reward", "x=1/own.yaml": "reward", "plain.yaml": None}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "data: {source: owner/rows}\n"
        (tmp_path / name).write_text(f"stage: {stage}\n{text}" if stage else text)
    run = tmp_path / "runs" / "dpo-old-33333333"
    run.mkdir(parents=True)
    record = {"format": FORMAT, "status": "finished", "stage": "dpo", "recipe": "old", "digest": "33333333"}
    record["reload"] = {}
    (run / "run.json").write_text(json.dumps(record))
    (run / "recipe.yaml").write_text("stage: dpo\ndata: {source: owner/pairs}\n")


@pytest.mark.parametrize(("word", "stage", "name"), RECIPES, ids=[word for word, _, _ in RECIPES])
def test_one_word_names_a_recipe_for_every_command(
    call: Call, recipes: None, word: str, stage: str, name: str
) -> None:
    status, out, err = call("show", word, "--json")
    assert (status, err) == (0, "") and (json.loads(out)["stage"], json.loads(out)["recipe"]) == (stage, name)
    recipe = load_recipe(word)
    assert (recipe.stage, recipe.name) == (stage, name)
    if word in ("own.yaml", "dpo/hh"):
        status, out, _ = call("plan", word, "--base", "llama-2-7b", "--gpu", "h100", "--json")
        assert status in (0, 3) and (json.loads(out)["stage"], json.loads(out)["recipe"]) == (stage, name)


def test_a_name_of_several_stages_lists_them(call: Call, recipes: None) -> None:
    for verb in ("show", "plan", "data"):
        status, _, err = call(verb, "hh")
        assert status == 2 and "recipe 'hh': 5 stages have one" in err
        assert "one of chain-of-hindsight/hh, dpo/hh, ppo/hh, reward/hh, rloo/hh" in err
    with pytest.raises(UserError, match="write STAGE/RECIPE"):
        load_recipe("hh")
    assert load_recipe("hh", stage="reward").stage == "reward"
    for word in ("own.yaml", "dpo-old", "dpo/hh"):
        with pytest.raises(UserError, match="stage"):
            load_recipe(word, stage="sft")


def test_show_takes_the_options_of_a_run(call: Call) -> None:
    words = ["dpo/hh", "--base", "llama-2-7b", "--data", "owner/rows", "--adapter", "qlora"]
    status, out, _ = call("show", *words, "--json")
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(out)["settings"]}
    assert status == 0 and rows["data.source"] == ("owner/rows", "command line")
    assert rows["model.base"][0] == "llama-2-7b" and rows["adapter.method"][0] == "qlora"
    status, out, _ = call(
        "show", "ppo", "--reward", "reward/quickstart", "--from", "sft/quickstart", "--json"
    )
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(out)["settings"]}
    assert status == 0 and rows["model.init_from"] == ("sft/quickstart", "command line")
    assert rows["rewards.sources"][0][0]["run"] == "reward/quickstart"
