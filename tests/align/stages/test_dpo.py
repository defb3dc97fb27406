"""Complete DPO runs: their files, every loss, every adapter, and the refused recipes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align import cli
from align.dpo.reference_logps import rows_seen_by_run
from align.preference.losses.catalog import all_losses
from finetune.data.batches import optimizer_batches
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import TrainSettings
from finetune.training.loaded_model import load_finished_run
from finetune.training.result import Result

Runs, Recipes = Callable[..., Result], Callable[..., Recipe]
QUIET = {"evaluate__samples": 0}
SMALL = {"virtual_tokens": 5, "rank": 4, "dropout": 0.1, "encoder_hidden_size": 16, "bottleneck_size": 8}
FAST = ("prompt", "prefix", "qlora", "adalora")
OTHERS = [name for name in plugin_names(ADAPTERS) if name not in (*FAST, "lora", "bitfit")]
BY_STEP = {
    *("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"),
    *("logratios/chosen", "logratios/rejected", "objective/kl_per_token", "data/length_ratio"),
}


@pytest.mark.plots
def test_run_writes_its_files_and_learns(prefer: Runs) -> None:
    result = prefer(train__max_steps=12, train__evaluate_every=6)
    names = {path.name for path in result.directory.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "adapter"} <= names
    steps = [line for line in result.metrics if "loss" in line]
    assert len(steps) == 12 and all(line.keys() >= BY_STEP for line in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (steps[0]["rewards/margins"], steps[0]["rewards/accuracies"]) == (pytest.approx(0, abs=1e-5), 0.5)
    assert [line["step"] for line in result.metrics if "eval/loss" in line] == [6, 12]
    metrics = result.record["metrics"]
    assert metrics["eval/loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval/rewards/accuracies_before"] == 0.5
    assert metrics["eval/rewards/accuracies_after"] == 1.0 and metrics["eval/rewards/margins_after"] > 0.5
    assert metrics["eval/logratios/chosen_after"] == pytest.approx(
        metrics["eval/logps/chosen_after"] - metrics["eval/logps/chosen_before"], abs=1e-4
    )
    assert metrics["tokens_per_second"] > 0
    named = {"prompt", "expected", "before", "after"}
    assert len(result.samples) == 2 and [line for line in result.samples if not line.keys() >= named] == []
    assert "held-out accuracy" in (result.directory / "report.html").read_text(encoding="utf-8")
    assert load_finished_run(result.directory).model.training is False


def test_the_length_ratio_is_that_of_the_data(prefer: Runs, pairs_file: Path) -> None:
    result = prefer(train__max_steps=None, train__epochs=1, train__log_every=100, data__held_out=0, **QUIET)
    assert result.metrics == []  # fewer steps than log_every: no partial averages are logged
    result = prefer("other", train__max_steps=6, train__log_every=6, data__held_out=0, **QUIET)
    [line] = [line for line in result.metrics if "data/length_ratio" in line]
    assert line["step"] == 6 and 0 < line["data/length_ratio"] < 1, (
        "chosen sums are shorter than rejected text"
    )


@pytest.mark.parametrize("name", all_losses())
def test_every_loss_takes_three_steps(prefer: Runs, lists_file: Path, name: str) -> None:
    loss = all_losses()[name]
    settings = {"data__source": str(lists_file)} if loss.takes == "Lists" else {}
    result = prefer(dpo__loss=name, data__held_out=0, **settings, **QUIET)
    entries = [entry for entry in result.metrics if "loss" in entry]
    assert len(entries) == 3 and all(math.isfinite(value) for entry in entries for value in entry.values())
    assert ("logratios/chosen" in entries[0]) == loss.needs.reference
    results = {result_entry["name"]: result_entry for result_entry in result.record["preflight"]}
    assert ("reference" in results) == loss.needs.reference
    assert results["base"]["passed"] and "bit for bit" in results["base"]["detail"]
    weights = load_file(result.directory / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for value in weights.values()), "every B has left its zero initialization"


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_a_loss_on_pairs_learns_from_ranked_lists(prefer: Runs, lists_file: Path, name: str) -> None:
    result = prefer(dpo__loss=name, data__source=str(lists_file), train__max_steps=8, **QUIET)
    metrics = result.record["metrics"]
    assert metrics["eval/loss_after"] < 0.9 * metrics["eval/loss_before"]
    assert metrics["eval/rewards/accuracies_after"] > 0.6


def check_adapter(prefer: Runs, method: str) -> None:
    known = load_plugin(ADAPTERS, method, where="test").Settings.model_fields
    given: dict[str, Any] = {f"adapter__{key}": value for key, value in SMALL.items() if key in known}
    if method == "trainable_tokens":
        given["adapter__tokens"] = list(range(20, 60))
    if method == "adamix":
        given["adapter__consistency"] = False
    result = prefer(adapter__method=method, **given, **QUIET)
    entries = [entry for entry in result.metrics if "loss" in entry]
    assert len(entries) == 3
    if method != "adalora":  # its penalty is part of the loss
        assert entries[0]["loss"] == pytest.approx(math.log(2), abs=0.02), "they differ by dropout alone"
    checks = {check["name"]: check for check in result.record["preflight"]}
    assert (
        all(check["passed"] for check in checks.values()) and "loss 0.6931" in checks["reference"]["detail"]
    )
    metrics = result.record["metrics"]
    assert metrics["eval/loss_before"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["eval/logps/chosen_after"] != metrics["eval/logps/chosen_before"]


@pytest.mark.parametrize("method", FAST)
def test_some_adapters_learn_from_pairs(prefer: Runs, method: str) -> None:
    check_adapter(prefer, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS)
def test_every_adapter_learns_from_pairs(prefer: Runs, method: str) -> None:
    check_adapter(prefer, method)


def test_adamix_consistency_is_refused(prefer: Runs) -> None:
    with pytest.raises(UserError, match="adapter.consistency=false"):
        prefer(adapter__method="adamix", adapter__bottleneck_size=8)


def test_loss_is_a_name_a_mapping_or_command_line_overrides(dpo_recipe: Recipes) -> None:
    assert dpo_recipe().settings.dpo.loss == "dpo"
    assert dpo_recipe(words=("dpo.loss=ipo",)).settings.dpo.loss == "ipo"
    given = dpo_recipe(words=("dpo.loss.beta=0.2", "dpo.loss=ipo"))
    assert given.settings.dpo.loss == {"name": "ipo", "beta": 0.2}
    assert given.origins["dpo.loss"] == "command line"
    assert dpo_recipe(words=("dpo.loss.beta=0.5",)).settings.dpo.loss_name == "dpo"
    mapping = dpo_recipe(dpo__loss={"name": "simpo", "margin": 0.5}, words=("dpo.loss.beta=2.5",))
    assert mapping.settings.dpo.loss == {"name": "simpo", "margin": 0.5, "beta": 2.5}


BAD = {
    "dpo.loss=ippo": ["dpo.loss (command line)", "the loss 'ippo' is unknown", "did you mean 'ipo'?"],
    "dpo.loss.beta=-1": ["dpo.loss.beta (command line)", "found -1", "a number above 0"],
    "dpo.loss.betta=1": ["unknown setting", "for the loss 'dpo': beta", "did you mean 'beta'?"],
    "dpo.loss={name: ipo, length_normalized: max}": ["dpo.loss.length_normalized", "true or false"],
    "dpo.loss=3": ["dpo.loss", "found 3", "a string, or a mapping"],
    "dpo.reference=frozen": ["dpo.reference", "one of precomputed, live"],
    "train.neftune_alpha=5": ["train.neftune_alpha", "train.neftune_alpha=null"],
    "train.label_smoothing=0.1": ["train.label_smoothing", "{name: cdpo, label_smoothing: 0.1}"],
    "data.packing=true": ["data.packing", "already share a row"],
    "dpo.max_chosen_logp_drop=0.5": ["train.evaluate_every is null", "train.evaluate_every=50"],
    "train.beta=0.1": ["train.beta", "`beta` is `dpo.loss.beta` here"],
    "data.source.x=1": ["'data.source.x'", "invalid override"],
}


@pytest.mark.parametrize("word", BAD)
def test_mistakes_are_reported_before_loading(dpo_recipe: Recipes, word: str) -> None:
    with pytest.raises(UserError) as caught:
        dpo_recipe(words=(word,))
    assert len(caught.value.problems) == 1
    for fragment in BAD[word]:
        assert fragment in str(caught.value)


def test_all_mistakes_at_once(dpo_recipe: Recipes) -> None:
    words = ("dpo.loss={name: dpo, beta: 0, x: 1}", "data.packing=true", "train.batch_size=0")
    with pytest.raises(UserError) as caught:
        dpo_recipe(words=words)
    assert [problem.where.split(" ")[0] for problem in caught.value.problems] == [
        "train.batch_size",
        "dpo.loss.beta",
        "dpo.loss.x",
        "data.packing",
    ]


def test_full_tuning_has_no_live_reference(dpo_recipe: Recipes) -> None:
    with pytest.raises(UserError, match="dpo.reference=precomputed"):
        dpo_recipe(adapter__method="full", dpo__reference="live")


def test_the_command_line_prints_a_summary(
    preference_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(preference_recipe), "--out", str(tmp_path / "run"), "dpo.loss=ipo", "dpo.loss.beta=0.2"]
    monkeypatch.setattr("sys.argv", ["llm-align", "dpo", *words])
    cli.main()
    output = capsys.readouterr().out
    assert "ok  reference" in output and "ok  stop token" in output and "held-out accuracy" in output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metrics"]["eval/loss_before"] == pytest.approx((1 / (2 * 0.2)) ** 2, rel=1e-4)
    monkeypatch.setattr("sys.argv", ["llm-align", "chat", str(tmp_path / "run"), "--prompt", "Add. 1 2"])
    cli.main()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "group_by_length"), [(1, True), (3, False), (5, True), (40, True)])
def test_rows_seen_by_run_are_those_of_its_steps(steps: int, group_by_length: bool) -> None:
    lengths, batch = [3 + 5 * i % 11 for i in range(29)], 4
    options = {"seed": 7, "group_by_length": group_by_length}
    order = [row for epoch in range(6) for row in optimizer_batches(lengths, batch, epoch=epoch, **options)]
    expected = sorted({row for rows in order[:steps] for row in rows})
    assert rows_seen_by_run(lengths, TrainSettings(batch_size=batch, **options), steps=steps) == expected
    assert torch.tensor(expected).max() < 29
