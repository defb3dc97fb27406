"""DPO diagnostics in run.json and report.html, and the early stop on chosen log-probabilities."""

from collections.abc import Callable

import pytest
from rich.console import Console

from finetune.recipe.recipe import Recipe
from finetune.training.result import Result
from finetune.training.stage import run_stage

Runs, Recipes = Callable[..., Result], Callable[..., Recipe]


@pytest.mark.plots
def test_pain_15_a_run_explains_itself(dpo_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dpo_recipe(train__max_steps=16, train__learning_rate=0.03)
    result = run_stage(recipe, Console(width=300), command="a test")
    findings = {finding["name"]: finding for finding in result.record["diagnostics"]}
    assert "saturated" in findings and findings["likelihood"]["warned"]
    page = (result.directory / "report.html").read_text(encoding="utf-8")
    assert "Diagnostics" in page and "adds an NLL term" in page
    output = capsys.readouterr().out
    assert "!!  likelihood" in output and "--  learning" in output


def test_pain_15_run_stops_on_chosen_logp_drop(
    dpo_recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"train__max_steps": 40, "train__learning_rate": 0.03, "train__evaluate_every": 2}
    recipe = dpo_recipe(dpo__max_chosen_logp_drop=0.03, **settings)
    result = run_stage(recipe, Console(width=300), command="a test")
    last = result.metrics[-1]["step"]
    assert 2 <= last < 40 and f"stopped at step {last}" in capsys.readouterr().out
    assert (
        f"stopped at step {last}: held-out chosen log-probability dropped by" in result.record["stop_reason"]
    )
    chosen_logps = [line["eval/logps/chosen"] for line in result.metrics if "eval/loss" in line]
    initial = result.record["metrics"]["eval/logps/chosen_before"]
    assert initial - chosen_logps[-1] > 0.03 and all(initial - value <= 0.03 for value in chosen_logps[:-1])
    assert result.record["status"] == "finished"
    steps = [int(path.name[11:]) for path in (result.directory / "checkpoints").glob("checkpoint-*")]
    assert last not in steps, "a run killed here evaluates this step again"
