"""A recipe whose reward is another recipe: that one runs first, and all its names refer to one run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align import cli, load_recipe, run
from finetune.training import fit

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [
    {"prompt": f"Add the numbers. {i}", "chosen": f"good {i % 7}", "rejected": f"evil {i % 5}"}
    for i in range(12)
]
TRAIN = "train: {{max_steps: 2, batch_size: 4, learning_rate: 1e-2}}\n"
RECIPES = {
    "sft/first": """\
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, max_length: 128}}
evaluate: {{samples: 0}}
"""
    + TRAIN,
    "reward/judge": """\
model: {{init_from: sft/first}}
data: {{source: {pairs}, held_out: 2, max_length: 128}}
evaluate: {{samples: 0}}
"""
    + TRAIN,
    "rejection/second": """\
model: {{init_from: sft/first}}
data: {{source: {pairs}, template: alpaca}}
evaluate: {{samples: 0}}
rewards: {{sources: reward/judge}}
sampling: {{max_new_tokens: 4}}
rejection: {{prompts: 4, num_generations: 2, truncated: train}}
"""
    + TRAIN,
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, base_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    for name, text in RECIPES.items():
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(base=base_folder, rows=rows_file, pairs=pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs the CLI in this process: arguments in; exit status, stdout, stderr out."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *words])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def records(here: Path) -> dict[str, dict]:
    all_records = [json.loads(file.read_text()) for file in (here / "runs").glob("*/run.json")]
    return {record["recipe"]: record for record in all_records}


def test_reward_recipe_runs_first_and_is_reused(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("show", "second", "--stage", "rejection")[0] == 0
    assert not (here / "runs").exists(), "showing runs nothing"
    status, out, err = call("rejection", "second")
    assert status == 0, err
    by_recipe = records(here)
    assert set(by_recipe) == {"first", "judge", "second"}
    reward_run = f"runs/reward-judge-{by_recipe['judge']['digest']}"
    assert (
        f"takes rewards from reward/judge, which has no finished run; running it first ({reward_run})\n"
        in out
    )
    assert f"{reward_run} is finished; continuing with rejection second\n" in out
    assert by_recipe["second"]["rewards"][0]["run"] == reward_run
    assert by_recipe["second"]["rewards"][0]["files"] == by_recipe["judge"]["files"]

    monkeypatch.setattr(fit, "fit", lambda *_, **__: pytest.fail("it trains again"))
    for arguments in (
        [],
        ["--reward", "reward-judge"],
        ["--reward", reward_run],
        ["--reward", str(here / reward_run)],
    ):
        status, out, err = call("rejection", "second", *arguments)
        assert status == 0, err
    assert f"takes rewards from {reward_run} (reward/judge)\n" not in out and len(records(here)) == 3
    recipe = load_recipe("second", stage="rejection", reward=here / reward_run)
    assert run(recipe).record["digest"] == by_recipe["second"]["digest"]


def test_invalid_reward_recipe_is_reported_before_running(call: Call, here: Path) -> None:
    path = here / "recipes" / "reward" / "judge.yaml"
    path.write_text(path.read_text().replace("max_steps", "max_stepz"))
    status, _, err = call("rejection", "second")
    assert status == 2 and "train.max_stepz (judge.yaml:4): unknown key" in err
    assert not (here / "runs").exists()


def test_circular_dependency_over_init_and_rewards_is_reported(call: Call, here: Path) -> None:
    path = here / "recipes" / "reward" / "judge.yaml"
    path.write_text(path.read_text().replace("sft/first", "rejection/second"))
    status, _, err = call("rejection", "second")
    assert status == 2
    assert "circular dependency: reward/judge -> rejection/second -> reward/judge" in err


def test_changed_rule_in_a_reward_recipe_makes_a_new_run(call: Call, here: Path) -> None:
    (here / "mine.py").write_text("def brief(prompt, completion):\n    return -len(completion)\n")
    path = here / "recipes" / "reward" / "judge.yaml"
    path.write_text(path.read_text() + "reward: {rules: [{name: brief, function: 'mine.py:brief'}]}\n")
    assert call("rejection", "second")[0] == 0
    assert call("rejection", "second")[0] == 0 and len(list((here / "runs").iterdir())) == 3
    (here / "mine.py").write_text("def brief(prompt, completion):\n    return 1 - len(completion)\n")
    assert call("rejection", "second")[0] == 0
    assert len(list((here / "runs").iterdir())) == 5, "another reward run, and another rejection run"


def test_reward_option_is_for_stages_with_rewards(call: Call) -> None:
    assert "--reward RUN" in call("rejection", "--help")[1]
    assert "--reward" not in call("sft", "--help")[1]
    status, _, err = call("sft", "first", "--reward", "x")
    assert status == 2 and "--reward" in err
