"""Names on the command line: a finished run by its name or a prefix, and a recipe as STAGE/RECIPE."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align import cli, load_reward, load_tuned
from finetune.recipe.errors import UserError
from finetune.recipe.runs import FORMAT

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Return a function from arguments to exit status, stdout and stderr, in a folder with two runs."""
    monkeypatch.chdir(tmp_path)
    for name, day in {"sft-quickstart-11111111": 1, "sft-quickstart-22222222": 2}.items():
        record = {"format": FORMAT, "status": "finished", "recipe": "quickstart", "digest": name[-8:]}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record | {"finished": f"2026-01-0{day}"}))

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
    "merge": ("finetune.training.save.merge_run", ()),
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
    monkeypatch.setattr("finetune.training.loaded_model.load_finished_run", lambda run: run)
    monkeypatch.setattr("align.reward.scorer.load_reward_model", lambda run: run)
    assert load_tuned("sft-quickstart") == load_reward("runs/sft-quickstart") == NEWEST
    assert load_tuned(NEWEST.resolve()) == NEWEST.resolve()
    with pytest.raises(UserError, match="there is no run 'dpo-quickstart'"):
        load_tuned("dpo-quickstart")


@pytest.mark.parametrize("verb", ["show", "plan"])
def test_the_stage_may_stand_before_the_recipe(call: Call, verb: str) -> None:
    expected = call(verb, "quickstart", "--stage", "dpo", "train.epochs=2", "--json")
    assert expected[0] == 0 and '"stage": "dpo"' in expected[1]
    assert call(verb, "dpo/quickstart", "train.epochs=2", "--json") == expected
    assert call(verb, "dpo/quickstart", "--stage", "dpo", "train.epochs=2", "--json") == expected
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
