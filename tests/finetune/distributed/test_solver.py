"""The compatibility solver: every rule applies, combinations are checked, values changed or refused."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from align.planner.compatibility import matrix_cells
from finetune.distributed.solver import (
    OFFLOADS,
    OPTIMIZER_NAMES,
    RECIPE_KEYS,
    SOLVER_ORIGIN,
    STRATEGIES,
    Combination,
    LaunchTarget,
    check,
    refuse_incompatible,
    resolve,
    resolve_auto_strategy,
    solver_rules,
)
from finetune.recipe.discovery import PROJECT, stage_names
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, read_recipe

LAPTOP = LaunchTarget("cpu", bfloat16=False, processes=1)
TWO_PROCESSES = LaunchTarget("cpu", bfloat16=False, processes=2)
GPUS_8 = LaunchTarget("cuda", bfloat16=True, processes=8)
SEVERAL = {"processes": 2}
SHIPPED = sorted(file for stage in stage_names() for file in (PROJECT / "recipes" / stage).glob("*.yaml"))

RULE_CASES: dict[str, dict[str, Any]] = {
    "quantization": {"adapter": "pissa", "quantization": "nf4"},
    "engine": {"adapter": "lora_plus", "engine": "trl"},
    "reward-head": {"stage": "reward", "adapter": "trainable_tokens"},
    "trl-reference": {"stage": "dpo", "adapter": "pissa", "engine": "trl"},
    "trl-reference-only": {"stage": "kto", "adapter": "pissa", "engine": "trl"},
    "consistency": {"stage": "ppo", "adapter": "adamix", "two_passes": True},
    "trl-only": {"stage": "grpo", "engine": "native"},
    "native-only": {"stage": "ppo", "engine": "trl"},
    "float16-cpu": {"precision": "float16"},
    "tf32-cpu": {"tf32": True},
    "bfloat16-emulated": {"precision": "bfloat16", "device": "cuda", "bfloat16": False},
    "single-process-strategy": {"strategy": "single", **SEVERAL},
    "one-process": {"strategy": "zero2"},
    "ddp-offload": {"strategy": "ddp", "offload": "cpu", **SEVERAL},
    "ddp-nvme": {"strategy": "ddp", "offload": "nvme", **SEVERAL},
    "offload-one-process": {"offload": "cpu"},
    "fsdp2-offload": {"strategy": "fsdp2", "offload": "cpu", **SEVERAL},
    "nvme-cpu": {"strategy": "zero3", "offload": "nvme", **SEVERAL},
    "nvme-needs-zero3": {"strategy": "zero2", "offload": "nvme", "device": "cuda", **SEVERAL},
    "reward-models-sharded": {"stage": "ppo", "strategy": "zero3", **SEVERAL},
    "fsdp2-quantized": {"strategy": "fsdp2", "adapter": "qlora", **SEVERAL},
    "int8-sharded": {"strategy": "zero3", "quantization": "int8", **SEVERAL},
    "pissa-fsdp2": {"strategy": "fsdp2", "adapter": "pissa", **SEVERAL},
    "dora-fsdp2": {"strategy": "fsdp2", "adapter": "dora", **SEVERAL},
    "fsdp2-full": {"strategy": "fsdp2", "adapter": "full", **SEVERAL},
    "trl-sharded": {"strategy": "zero3", "engine": "trl", **SEVERAL},
    "adafactor-zero": {"strategy": "zero1", "optimizer": "adafactor", **SEVERAL},
    "adalora-zero": {"strategy": "zero2", "adapter": "adalora", **SEVERAL},
    "trainable-tokens-cpu": {"strategy": "zero3", "adapter": "trainable_tokens", **SEVERAL},
}


def recipe(tmp_path: Path, text: str = "", stage: str = "sft", **settings: Any) -> Recipe:
    file = tmp_path / "mine.yaml"
    file.write_text(f"stage: {stage}\ndata: {{source: [{{text: a}}]}}\n{text}", encoding="utf-8")
    return read_recipe(
        stage, str(file), shortcuts={key.replace("__", "."): value for key, value in settings.items()}
    )


def test_every_rule_has_a_case() -> None:
    assert set(RULE_CASES) == {rule.name for rule in solver_rules()}


@pytest.mark.parametrize("name", RULE_CASES)
def test_each_rule_applies_and_its_change_works(name: str) -> None:
    combination = Combination(**RULE_CASES[name])
    verdict = check(combination)
    assert verdict.rules[0].name == name
    assert verdict.kind == ("changed" if verdict.rules[0].changes else "incompatible")
    if verdict.kind == "changed":
        assert check(combination.with_changes(verdict.changes)).kind == "works"
    assert verdict.repair and verdict.reason and verdict.rules[0].source


@pytest.mark.parametrize("stage", stage_names())
def test_every_matrix_cell_has_a_verdict(stage: str) -> None:
    for device in ("cpu", "cuda"):
        verdicts = [(cell, check(cell)) for cell in matrix_cells(stage, device)]
        assert len(verdicts) == len(STRATEGIES) * 67
        for cell, verdict in verdicts:
            assert verdict.kind == "works" or (verdict.reason and verdict.rules)
            if verdict.kind == "changed":
                assert check(cell.with_changes(verdict.changes)).kind == "works"


def test_check_terminates_for_every_combination() -> None:
    kinds = {"works": 0, "changed": 0, "incompatible": 0}
    for strategy_name, optimizer, offload, device, count, engine, quantization in product(
        STRATEGIES,
        OPTIMIZER_NAMES,
        OFFLOADS,
        ("cpu", "cuda"),
        (1, 2),
        ("native", "trl"),
        ("none", "nf4", "int8"),
    ):
        verdict = check(
            Combination(
                quantization=quantization,
                strategy=strategy_name,
                processes=count,
                offload=offload,
                engine=engine,
                optimizer=optimizer,
                device=device,
            )
        )
        kinds[verdict.kind] += 1
    assert kinds["works"] > 100 and kinds["changed"] > 100


def test_rules_that_undo_each_other_are_incompatible() -> None:
    verdict = check(Combination(stage="rloo", adapter="adalora", engine="trl"))
    assert verdict.kind == "incompatible" and [rule.name for rule in verdict.rules] == ["engine", "trl-only"]


def test_changes_are_chained() -> None:
    verdict = check(Combination(strategy="fsdp2", quantization="int8", processes=2))
    assert verdict.changes == {"train.strategy": "zero2"}
    assert "DTensors" in verdict.reason and "8-bit layers" in verdict.reason


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"processes": 1, "strategy": "zero3"}, "single"),
        ({"processes": 2}, "ddp"),
        ({"processes": 8, "device": "cuda"}, "ddp"),
        ({"processes": 8, "device": "cuda", "offload": "cpu"}, "zero1"),
        ({"processes": 8, "device": "cuda", "offload": "nvme"}, "zero3"),
    ],
)
def test_auto_strategy_is_the_first_that_works(properties: dict[str, Any], expected: str) -> None:
    assert resolve_auto_strategy(Combination(**properties)) == expected


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_shipped_recipes_are_compatible_everywhere(file: Path) -> None:
    shortcuts = {"data.source": [{"text": "a"}]} if file.stem == "in-house" else {}
    shipped = read_recipe(file.parent.name, file.stem, shortcuts=shortcuts or None)
    for target in (LAPTOP, TWO_PROCESSES, GPUS_8):
        assert resolve(shipped, target) is shipped


def test_compatible_recipes_are_unchanged(tmp_path: Path) -> None:
    for target in (LAPTOP, TWO_PROCESSES, GPUS_8):
        unchanged = recipe(tmp_path)
        assert resolve(unchanged, target) is unchanged


def test_auto_strategy_is_resolved_with_a_note(tmp_path: Path) -> None:
    resolved = resolve(recipe(tmp_path, train__offload="nvme"), GPUS_8)
    assert resolved.settings.train.strategy == "zero3"
    assert resolved.origins["train.strategy"] == SOLVER_ORIGIN
    assert resolved.notes == [
        "train.strategy=zero3: only ZeRO-3 offloads to NVMe; plain data parallelism has no offload"
    ]
    assert "zero3" in resolved.to_yaml() and "# solver" in resolved.to_yaml()
    assert resolve(resolved, GPUS_8) is resolved


def test_defaults_are_changed_with_a_note(tmp_path: Path) -> None:
    resolved = resolve(recipe(tmp_path, "adapter: {method: adamix}\n", stage="dpo"), LAPTOP)
    assert resolved.settings.adapter.model_dump()["consistency"] is False
    assert resolved.notes == [
        f"adapter.consistency=false: {check(Combination(**RULE_CASES['consistency'])).reason}"
    ]


@pytest.mark.parametrize(
    ("target", "settings", "fragments"),
    [
        (
            TWO_PROCESSES,
            {"train__strategy": "fsdp2", "train__offload": "cpu"},
            ["train.strategy", "train.offload=cpu", "train.strategy=zero3"],
        ),
        (
            LAPTOP,
            {"train__strategy": "zero3"},
            ["train.strategy", "1 process", "train.num_processes=2 or more"],
        ),
        (TWO_PROCESSES, {"train__strategy": "single"}, ["2 processes", "train.num_processes=1"]),
        (
            TWO_PROCESSES,
            {"train__strategy": "zero3", "model__quantization": "int8"},
            ["int8", "order of magnitude", "train.strategy=zero2"],
        ),
        (
            TWO_PROCESSES,
            {"train__strategy": "zero2", "train__optimizer": "adafactor"},
            ["adafactor", "rows and columns", "train.optimizer=adamw"],
        ),
        (LAPTOP, {"train__offload": "cpu"}, ["train.offload", "train.num_processes=2 or more"]),
    ],
)
def test_pain_09_incompatible_requested_settings_are_refused(
    target: LaunchTarget, settings: dict[str, Any], fragments: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(recipe(tmp_path, **settings), target)
    [problem] = caught.value.problems
    assert all(fragment in str(problem) for fragment in fragments), str(problem)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_stage_refuses_float16_on_a_cpu(bfloat16: bool, tmp_path: Path) -> None:
    cpu = LaunchTarget("cpu", bfloat16, processes=1)
    with pytest.raises(UserError) as error:
        refuse_incompatible(recipe(tmp_path, model__precision="float16"), cpu)
    [problem] = error.value.problems
    assert problem.where.startswith("model.precision") and problem.actual == "float16, with the CPU"
    assert "no fast float16" in problem.expected and problem.repair == "model.precision=auto"
    refuse_incompatible(recipe(tmp_path), cpu)


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_stage_without_labels_refuses_two_forward_passes(stage: str, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("def good(prompt, completion):\n    return 1.0\n", encoding="utf-8")
    text = f"rewards: {{sources: '{tmp_path}/good.py:good'}}\n" if stage == "ppo" else ""
    two_passes = recipe(tmp_path, f"{text}adapter: {{method: adamix}}\n", stage=stage)
    with pytest.raises(UserError, match="needs labels, which this stage does not have") as error:
        refuse_incompatible(two_passes, LAPTOP)
    [problem] = error.value.problems
    assert problem.where.startswith("adapter.consistency") and problem.repair == "adapter.consistency=false"
    refuse_incompatible(resolve(two_passes, LAPTOP), LAPTOP)


def test_settings_in_the_recipe_file_are_never_changed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.strategy=zero3"):
        resolve(recipe(tmp_path, "train: {strategy: fsdp2}\nadapter: {method: pissa}\n"), TWO_PROCESSES)


def test_keys_exist_in_recipes(tmp_path: Path) -> None:
    values = recipe(tmp_path, "adapter: {method: adamix}\n").values()
    for key in RECIPE_KEYS.values():
        section, name, *_ = key.split(".")
        assert name in values[section], key
    assert {key for rule in solver_rules() for key in rule.changes} <= set(RECIPE_KEYS.values())
    properties = replace(Combination(), strategy="ddp").properties()
    assert all(name in properties for rule in solver_rules() for name in rule.when)
