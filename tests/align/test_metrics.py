"""One table defines every metric that a stage plots, summarizes or logs, under names that trackers group."""

import json
import re
import subprocess
import sys

import pytest
from transformers.integrations.integration_utils import rewrite_logs

from align.dpo.diagnostics import DPO_METRICS
from align.online.evaluation import online_metric_spec
from align.ppo.diagnostics import ppo_metric_spec
from align.rejection.diagnostics import rejection_metric_spec
from align.reward.diagnostics import reward_metric_spec
from align.stages.kto import KTO_METRICS
from finetune.recipe.discovery import stage_names
from finetune.recipe.recipe import read_recipe
from finetune.training.metric_specs import SUPERVISED_METRICS, MetricSpec
from finetune.training.metrics import METRICS, as_logged, as_recorded, metric_lines

ONE, TWO = (
    "{function: 'finetune/graders/stories.py:happy_end', name: one}",
    "{run: reward/quickstart, name: two}",
)
SOURCES = [f"rewards.sources=[{ONE}, {TWO}]"]
MIX = "data.mix=[{source: x/y, head: a}, {source: x/z, head: b}]"


def settings(stage: str, *words: str):
    return read_recipe(stage, "quickstart", overrides=words).settings


def recorded() -> dict[str, tuple[MetricSpec, tuple[str, ...]]]:
    """Return by stage what its report shows, and what else run.json holds of its training."""
    heads = settings("reward", "reward.heads=[a, b]", "data.source=null", "data.held_out=0.1", MIX)
    online = {stage: online_metric_spec(["one", "length_penalty"]) for stage in ("rloo", "grpo")}
    online["ppo"] = ppo_metric_spec(settings("ppo", *SOURCES))
    return {
        **{stage: (SUPERVISED_METRICS, ()) for stage in ("sft", "pretrain", "chain_of_hindsight")},
        "dpo": (DPO_METRICS, DPO_METRICS.first_last),
        "kto": (KTO_METRICS, KTO_METRICS.first_last),
        "reward": (reward_metric_spec(heads), ()),
        **{stage: (spec, spec.first_last) for stage, spec in online.items()},
        "rejection": (rejection_metric_spec(settings("rejection", *SOURCES)), ()),
    }


def test_every_metric_that_a_stage_shows_is_defined_for_it() -> None:
    specs = recorded()
    assert set(specs) == set(stage_names())
    for stage, (spec, first_last) in specs.items():
        patterns = [
            re.sub(r"<\w+>", r"\\w+", name)
            for metric in METRICS
            if stage in metric.stages
            for name in metric.names
        ]
        for name in {*spec.logged_keys, *spec.summary, *first_last} - {"eval/exact_match", "eval/perplexity"}:
            assert any(re.fullmatch(pattern, name) for pattern in patterns), f"{stage}: {name}"


def test_a_metric_has_one_definition_in_a_stage() -> None:
    for stage in stage_names():
        names = [name for metric in METRICS if stage in metric.stages for name in metric.names]
        assert len(names) == len(set(names)), stage
    kl = {
        metric.name: metric.formula
        for metric in METRICS
        if "kl" in metric.name.lower() or metric.name == "kto/z"
    }
    assert "kl" not in kl and len(kl) == 5
    assert all(
        "_" in metric.name or "/" in metric.name or metric.name in ("loss", "perplexity", "retention")
        for metric in METRICS
    )


@pytest.mark.parametrize("name", ["loss", "rewards/margins", "val/eos_rate"])
def test_held_out_metrics_reach_trackers_as_they_are_recorded(name: str) -> None:
    logged = as_logged(f"eval/{name}")
    assert logged == f"eval_{name}" and as_recorded(logged) == f"eval/{name}"
    assert rewrite_logs({logged: 1.0, name: 2.0}) == {f"eval/{name}": 1.0, f"train/{name}": 2.0}
    assert as_logged(name) == as_recorded(name) == name


def test_the_table_needs_no_torch_and_is_what_list_prints() -> None:
    lines = (
        "import sys",
        "from align import cli",
        "sys.argv = ['llm-align', 'list', 'metrics', '--json']",
        "cli.main()",
        "assert 'torch' not in sys.modules",
    )
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    listed = json.loads(ended.stdout)["metrics"]
    assert listed == metric_lines()
    assert "higher is better" in listed["eval/rewards/accuracies"] and listed["kto/z"].startswith("kto: ")
    assert "dpo: " in listed["loss"] and "nats/token" in listed["eval/loss"]
