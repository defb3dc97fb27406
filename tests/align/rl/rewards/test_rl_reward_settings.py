"""Rewards of a recipe: short forms, error messages, and the digest of reward runs and functions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reward_sections import RewardedSettings, rewards, stage

from align.rl.rewards.settings import REWARD_RULES, RewardsSettings, has_rewards_section, reward_run_folder
from finetune.recipe.compatibility import problems_of
from finetune.recipe.errors import UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules import recipe_properties
from finetune.training.fingerprint import run_fingerprint

Paths = dict[str, str]
Given = Callable[[Paths], tuple[list[Any], dict[str, Any]]]


def problems(base: Path, section: RewardsSettings, **how: str) -> list[tuple[str, str]]:
    settings, sections = stage(base, section, **how), ("model", "data", "rewards")
    reported = problems_of(REWARD_RULES, settings, recipe_properties("ppo", settings, sections), sections)
    return [(problem.where, str(problem)) for problem in reported]


@pytest.fixture
def paths(
    lone_run: Path, whole_run: Path, talker_run: Path, rewards_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Paths:
    """Return the paths that the cases below refer to."""
    runs = {"lone": lone_run, "whole": whole_run, "talker": talker_run}
    return {name: str(path) for name, path in runs.items()} | {"file": f"{rewards_folder}/programs.py"}


def test_short_forms_equal_long_forms() -> None:
    run, program = {"run": "reward/quickstart"}, {"function": "my.py:good"}
    assert RewardsSettings.model_validate({"sources": "reward/quickstart"}) == rewards(run)
    assert RewardsSettings.model_validate({"sources": run}) == rewards(run)
    assert rewards("reward/quickstart", "my.py:good") == rewards(run, program)
    total, several = {**run, "score": "total"}, [{**run, "score": "help"}, {**run, "name": "n"}]
    names = [source.metric_name for source in rewards(run, program, *several, total).sources]
    assert names == ["reward", "good", "help", "n", "reward"]
    assert rewards(max).sources[0].metric_name == "max" and rewards(lambda c: c).sources[0].function


CASES: dict[str, tuple[Given, str, str]] = {
    "nothing": (lambda at: ([], {}), "rewards.sources", "no reward is given"),
    "neither": (
        lambda at: ([{"weight": 2.0}], {}),
        "rewards.sources[0]",
        "neither run nor function is given",
    ),
    "both": (
        lambda at: ([{"run": at["lone"], "function": f"{at['file']}:good"}], {}),
        "rewards.sources[0]",
        "both run and function are given",
    ),
    "an unknown function": (
        lambda at: ([f"{at['file']}:god"], {}),
        "rewards.sources[0].function",
        "did you mean 'good'?",
    ),
    "no such file": (lambda at: (["no/such.py:f"], {}), "rewards.sources[0].function", "does not exist"),
    "wrong arguments": (
        lambda at: ([f"{at['file']}:few"], {}),
        "rewards.sources[0].function",
        "few(prompt) takes no `completion`",
    ),
    "a score of a function": (
        lambda at: ([{"function": f"{at['file']}:good", "score": "x"}], {}),
        "rewards.sources[0].score",
        "a function has a single score",
    ),
    "the same name twice": (
        lambda at: ([at["lone"], at["whole"]], {}),
        "rewards.sources[1].name",
        "duplicate name 'reward'",
    ),
    "no such run": (
        lambda at: (["reward-nobody"], {}),
        "rewards.sources[0].run",
        "there is no run 'reward-nobody'",
    ),
    "a run that writes text": (lambda at: ([at["talker"]], {}), "rewards.sources[0].run", "of stage sft"),
    "a recipe of another stage": (
        lambda at: (["sft/quickstart"], {}),
        "rewards.sources[0].run",
        "of stage sft",
    ),
    "no such recipe": (
        lambda at: (["reward/quickstrat"], {}),
        "recipe 'quickstrat'",
        "did you mean 'quickstart'?",
    ),
    "another base": (
        lambda at: (["reward/quickstart"], {}),
        "rewards.sources[0].run",
        "is on base 'tiny', the policy on",
    ),
    "no such score": (
        lambda at: ([{"run": at["lone"], "score": "rewrad"}], {}),
        "rewards.sources[0].score",
        "did you mean 'reward'?",
    ),
    "llama2 with one source": (
        lambda at: ([at["lone"]], {"combine": "llama2"}),
        "rewards.combine",
        "two sources named helpfulness and safety",
    ),
    "llama2 with weights": (
        lambda at: (
            [
                {"run": at["lone"], "name": "helpfulness", "weight": 2.0},
                {"run": at["whole"], "name": "safety"},
            ],
            {"combine": "llama2"},
        ),
        "rewards.combine",
        "weights of 1",
    ),
    "risky without llama2": (
        lambda at: ([at["lone"]], {"unsafe_prompt_fn": f"{at['file']}:asks"}),
        "rewards.unsafe_prompt_fn",
        "rewards.combine=sum",
    ),
    "risky of two arguments": (
        lambda at: ([at["lone"]], {"unsafe_prompt_fn": f"{at['file']}:good"}),
        "rewards.unsafe_prompt_fn",
        "parameters named prompt\n",
    ),
    "nothing counts": (
        lambda at: ([{"run": at["lone"], "weight": 0.0}], {}),
        "rewards.sources",
        "all weights are 0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_invalid_rewards_are_reported_before_loading(case: str, paths: Paths, base_folder: Path) -> None:
    given, where, message = CASES[case]
    sources, settings = given(paths)
    reported = problems(base_folder, rewards(*sources, **settings))
    assert any(key == where and message in text for key, text in reported), reported


def test_other_template_is_rejected_on_a_shared_base_only(paths: Paths, base_folder: Path) -> None:
    [(where, message)] = problems(base_folder, rewards(paths["lone"]), template="alpaca")
    assert where == "rewards.sources[0].run" and "has template 'plain'" in message
    assert problems(base_folder, rewards(paths["whole"]), template="alpaca") == []
    assert problems(base_folder, rewards(paths["lone"], f"{paths['file']}:good")) == []


def test_missing_weights_and_unfinished_run_are_reported(
    lone_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(lone_run, copy)
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    [(where, message)] = problems(base_folder, rewards(str(copy)))
    assert where == "rewards.sources[0].run" and "lacks adapter/adapter_model.safetensors" in message
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    [(_, message)] = problems(base_folder, rewards(str(copy)))
    assert "a run with status 'interrupted'" in message and "resumes from step" in message


def test_circular_recipe_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes" / "reward"
    folder.mkdir(parents=True)
    for name, start in (("one", "reward/two"), ("two", "reward/one")):
        (folder / f"{name}.yaml").write_text(f"model: {{init_from: {start}}}\n")
    monkeypatch.chdir(tmp_path)
    [(where, message)] = problems(tmp_path, rewards("reward/one"))
    assert where == "rewards.sources[0].run"
    assert "circular dependency: reward/one -> reward/two -> reward/one" in message


def digest(base: Path, section: RewardsSettings) -> str:
    settings = stage(base, section)
    data = settings.data.model_copy(update={"source": PythonRows.of([{"prompt": "p"}])})
    settings = settings.model_copy(update={"data": data})
    assert isinstance(settings, RewardedSettings)
    return Recipe("rejection", "x", "", settings, {}).digest(run_fingerprint(settings))


def test_digest_depends_on_contents_not_on_paths(
    lone_run: Path, whole_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    copy, program = tmp_path / "copy", tmp_path / "my.py"
    shutil.copytree(lone_run, copy)
    program.write_text("def good(prompt, completion):\n    return 1.0\n")
    first = digest(base_folder, rewards(str(lone_run)))
    assert digest(base_folder, rewards(str(copy))) == first
    other = rewards({"run": str(lone_run), "weight": 2.0})
    model_digests = [first, digest(base_folder, rewards(str(whole_run))), digest(base_folder, other)]
    function_digests = [digest(base_folder, rewards(f"{program}:good"))]
    program.write_text("def good(prompt, completion):\n    return 2.0\n")
    function_digests.append(digest(base_folder, rewards(f"{program}:good")))
    assert len({*model_digests, *function_digests}) == 5


def test_recipe_without_a_run_has_no_folder() -> None:
    [source] = rewards("reward/quickstart").sources
    with pytest.raises(UserError, match="run `llm-align reward quickstart` first"):
        reward_run_folder(source, where="rewards.sources[0].run")


def test_reward_option_is_for_stages_with_rewards() -> None:
    assert not has_rewards_section("sft") and not has_rewards_section("reward")
