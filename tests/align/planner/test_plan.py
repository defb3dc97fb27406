"""Plans of all shipped recipes: they exist, and their auto values fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.planner.plan import RATE_SPREAD, Plan, make_plan
from finetune.distributed.hardware import SAFE_FRACTION, Device, device_by_name
from finetune.planner.estimate import estimate
from finetune.recipe.discovery import PROJECT, stage_names
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, read_recipe

FILES = sorted(file for stage in stage_names() for file in (PROJECT / "recipes" / stage).glob("*.yaml"))
ROWS = [{"text": f"{i} and {i + 1}"} for i in range(8)]
CPU, A100 = device_by_name("cpu"), device_by_name("a100-80g")


def plan_recipe(stage: str, name: str, target: Device = A100, count: int = 1, **values: Any) -> Plan:
    shortcuts = {key.replace("__", "."): value for key, value in values.items()}
    return make_plan(read_recipe(stage, name, shortcuts=shortcuts), target, count)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_shipped_recipe_has_a_plan(file: Path) -> None:
    shortcuts = {"data__source": ROWS} if file.stem == "in-house" else {}
    # As published, on 8 GPUs: TRL samples all 512 completions of a step at once, 161 GiB on one GPU.
    count = 8 if file.parent.name == "grpo" else 1
    plan = plan_recipe(file.parent.name, file.stem, A100, count, **shortcuts)
    estimated = plan.estimate
    assert plan.fits and 0 < estimated.trainable <= estimated.total
    assert (estimated.trainable < estimated.total) == ("adapter" in plan.disk)
    assert plan.peak.total == max(phase.total for phase in estimated.phases if phase.name != "merge")
    assert plan.peak.total > estimated.phases[0].total > 0
    assert plan.disk["checkpoints"] > 0
    known = plan.lengths.rows is not None or plan.recipe.settings.train.max_steps is not None
    assert (plan.work is not None) == known and (plan.time is not None) == known
    assert plan.lengths.basis and all(value and reason for value, reason in plan.auto.values())


def test_phase_names() -> None:
    supervised = [phase.name for phase in plan_recipe("sft", "alpaca").estimate.phases]
    assert supervised == ["load", "forward and backward", "optimizer step", "merge", "save"]
    assert "rollout" in [phase.name for phase in plan_recipe("ppo", "hh").estimate.phases]


def test_auto_micro_batch_is_the_largest_that_fits() -> None:
    small, large = plan_recipe("sft", "alpaca", device_by_name("rtx4090")), plan_recipe("sft", "alpaca", A100)
    assert small.fits and large.fits and small.micro_batch_size < large.micro_batch_size
    assert small.workload_of_rows(small.micro_batch_size).accumulation_steps == -(
        -128 // small.micro_batch_size
    )
    larger = estimate(small.workload_of_rows(small.micro_batch_size + 1))
    assert larger.micro_batch_peak.total > SAFE_FRACTION * small.device.available_bytes


def test_requested_micro_batch_is_kept_unchanged() -> None:
    plan = plan_recipe("sft", "alpaca", device_by_name("rtx4090"), train__micro_batch_size=16)
    assert plan.micro_batch_size == 16 and not plan.fits


def test_processes_split_the_batch_and_shard_states() -> None:
    single = plan_recipe("sft", "alpaca", adapter__method="full")
    sharded = plan_recipe("sft", "alpaca", A100, 8, adapter__method="full", train__strategy="zero3")
    assert (single.workload.processes, sharded.workload.processes, sharded.workload.strategy) == (
        1,
        8,
        "zero3",
    )
    assert not single.fits and sharded.fits
    assert sharded.estimate.base_bytes * 7 < single.estimate.base_bytes
    assert sharded.work is not None and single.work is not None and sharded.work.steps == single.work.steps


def test_old_gpus_use_float32_with_a_reason() -> None:
    value, reason = plan_recipe("sft", "alpaca", device_by_name("t4")).auto["model.precision"]
    assert value == "float32" and "no bfloat16" in reason


def test_completions_reduce_the_prompt_length() -> None:
    plan = plan_recipe("ppo", "quickstart", CPU, sampling__max_new_tokens=100, data__max_prompt_length=None)
    assert plan.auto["data.max_prompt_length"] == (
        "412",
        "maximum length minus a completion of 100 tokens",
    )


def test_documents_become_blocks() -> None:
    plan = plan_recipe("pretrain", "quickstart", CPU, data__max_length=64)
    rows = plan.lengths.rows
    assert rows is not None and plan.lengths.longest == 64 and plan.lengths.row_tokens == 64
    assert 100 < rows < 3000


def test_merge_is_not_a_phase_of_the_run() -> None:
    plan = plan_recipe(
        "sft", "alpaca", device_by_name("24GB"), adapter__method="qlora", model__base="llama-2-13b"
    )
    merge = plan.estimate.merge
    assert plan.fits and merge is not None and merge.total > plan.device.available_bytes


def test_unknown_base_is_one_problem() -> None:
    with pytest.raises(UserError) as caught:
        plan_recipe("sft", "alpaca", model__base="owner/unheard-of")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(("method", "base"), [("llama_adapter", "gemma-2-2b"), ("bitfit", "llama-2-7b")])
def test_unsupported_adapters_are_refused(method: str, base: str) -> None:
    with pytest.raises(UserError, match=r"adapter\.method.*a model of type"):
        plan_recipe("sft", "alpaca", adapter__method=method, model__base=base)


def write_run_record(recipe: Recipe, folder: Path, rate: float, seconds: float = 60.0) -> None:
    folder.mkdir(parents=True)
    record = {
        "format": 2,
        "status": "finished",
        "recipe": recipe.name,
        "digest": "0",
        "stage": recipe.stage,
        "hardware": {"device": "cpu", "name": "a CPU, 2 threads"},
        "reload": {"model": {"base": "tiny"}, "precision": "float32", "quantization": "none"},
        "metrics": {"tokens_per_second": rate},
        "seconds": {"train": seconds},
    }
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("stored", "quantization", "gibibytes"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", 0.752),
        ({"load_in_8bit": True}, "int8", 1.145),
        (None, "none", 2.05),
    ],
)
def test_stored_quantization_is_planned(
    tmp_path: Path, stored: dict[str, Any] | None, quantization: str, gibibytes: float
) -> None:
    if stored is not None:
        stored = {"quant_method": "bitsandbytes", **stored}
    base = write_config(tmp_path, quantization_config=stored)
    plan = plan_recipe("sft", "alpaca", model__base=base)
    assert plan.auto["model.quantization"][0] == plan.workload.quantization == quantization
    assert plan.estimate.base_bytes / 2**30 == pytest.approx(gibibytes, rel=0.01)


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({"hidden_size": "2048"}, {}),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}),
        ({"quantization_config": {"load_in_4bit": True}}, {"model__quantization": "int8"}),
        ({"quantization_config": {"load_in_4bit": True}}, {"adapter__method": "full"}),
    ],
)
def test_bases_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, values: dict[str, Any], overrides: dict[str, str]
) -> None:
    base = write_config(tmp_path, **values)
    with pytest.raises(UserError, match=r"^model\.(base|quantization): .*\n    expected: .*\n    repair: "):
        plan_recipe("sft", "alpaca", model__base=base, **overrides)


def write_config(folder: Path, **values: Any) -> str:
    """Write the config.json of a model of 1.1 billion parameters, and return its folder."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads, **values}))
    return str(folder)


def test_finished_runs_predict_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("sft", "quickstart")
    estimated = make_plan(recipe, CPU, 1)
    assert estimated.time is not None and estimated.time.basis.startswith("estimated")
    write_run_record(recipe, tmp_path / "runs" / "sft-quickstart-1", 1000.0)
    write_run_record(recipe, tmp_path / "runs" / "sft-quickstart-2", 2000.0)
    write_run_record(recipe, tmp_path / "runs" / "sft-quickstart-3", 9.0, seconds=5.0)
    measured = make_plan(recipe, CPU, 1)
    assert measured.time is not None and measured.work is not None
    assert "measured" in measured.time.basis and "sft-quickstart-1" in measured.time.basis
    assert measured.time.lower == pytest.approx(measured.work.trained_tokens / (2000 * (1 + RATE_SPREAD)))
    assert measured.time.upper == pytest.approx(measured.work.trained_tokens / (1000 * (1 - RATE_SPREAD)))
    elsewhere = make_plan(recipe, A100, 1)
    assert elsewhere.time is not None and elsewhere.time.basis.startswith("estimated")


def test_python_api_plans_the_same() -> None:
    from align import load_recipe
    from align import plan as planned_by_name

    plan = planned_by_name(load_recipe("alpaca", base="llama-2-7b"), gpu="rtx4090")
    assert plan.peak.total == plan_recipe("sft", "alpaca", device_by_name("rtx4090")).peak.total
