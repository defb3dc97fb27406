"""The compatibility solver: every rule applies, combinations are checked, values changed or refused."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from finetune.planning.compatibility import RULES
from finetune.planning.matrix import cells
from finetune.planning.solver import (
    KEYS,
    OFFLOADS,
    OPTIMIZERS,
    SOLVER,
    STRATEGIES,
    Combination,
    Machine,
    judge,
    settled,
    strategy,
)
from finetune.recipe.discovery import PROJECT, stage_names
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, load

LAPTOP = Machine("cpu", bfloat16=False, processes=1)
TWO = Machine("cpu", bfloat16=False, processes=2)
CARDS = Machine("cuda", bfloat16=True, processes=8)
SEVERAL = {"processes": 2}
SHIPPED = sorted(file for stage in stage_names() for file in (PROJECT / "recipes" / stage).glob("*.yaml"))

HITS: dict[str, dict[str, Any]] = {
    "quantization": {"adapter": "pissa", "quantization": "nf4"},
    "engine": {"adapter": "lora_plus", "engine": "trl"},
    "reward-head": {"stage": "reward", "adapter": "trainable_tokens"},
    "trl-reference": {"stage": "dpo", "adapter": "pissa", "engine": "trl"},
    "trl-reference-only": {"stage": "kto", "adapter": "pissa", "engine": "trl"},
    "consistency": {"stage": "ppo", "adapter": "adamix", "two_passes": True},
    "trl-only": {"stage": "grpo", "engine": "native"},
    "native-only": {"stage": "ppo", "engine": "trl"},
    "float16-cpu": {"precision": "float16"},
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
    return load(
        stage, str(file), shortcuts={key.replace("__", "."): value for key, value in settings.items()}
    )


def test_every_rule_has_a_case() -> None:
    assert list(HITS) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", HITS)
def test_a_rule_is_hit_and_its_change_helps(name: str) -> None:
    combination = Combination(**HITS[name])
    verdict = judge(combination)
    assert verdict.rules[0].name == name
    assert verdict.kind == ("changed" if verdict.rules[0].changes else "cannot")
    if verdict.kind == "changed":
        assert judge(combination.changed(verdict.changes)).kind == "works"
    assert verdict.repair and verdict.reason and verdict.rules[0].source


@pytest.mark.parametrize("stage", stage_names())
def test_every_cell_of_the_matrix_has_a_verdict(stage: str) -> None:
    for device in ("cpu", "cuda"):
        found = [(cell, judge(cell)) for cell in cells(stage, device)]
        assert len(found) == len(STRATEGIES) * 67
        for cell, verdict in found:
            assert verdict.kind == "works" or (verdict.reason and verdict.rules)
            if verdict.kind == "changed":
                assert judge(cell.changed(verdict.changes)).kind == "works"


def test_every_combination_of_strategy_optimizer_offload_and_hardware_ends() -> None:
    kinds = {"works": 0, "changed": 0, "cannot": 0}
    for how, optimizer, offload, device, count, engine, stored in product(
        STRATEGIES, OPTIMIZERS, OFFLOADS, ("cpu", "cuda"), (1, 2), ("native", "trl"), ("none", "nf4", "int8")
    ):
        verdict = judge(
            Combination(
                quantization=stored,
                strategy=how,
                processes=count,
                offload=offload,
                engine=engine,
                optimizer=optimizer,
                device=device,
            )
        )
        kinds[verdict.kind] += 1
    assert kinds["works"] > 100 and kinds["changed"] > 100


def test_what_is_done_twice_back_and_forth_cannot_be() -> None:
    verdict = judge(Combination(stage="rloo", adapter="adalora", engine="trl"))
    assert verdict.kind == "cannot" and [rule.name for rule in verdict.rules] == ["engine", "trl-only"]


def test_a_change_that_needs_another_one_is_followed() -> None:
    verdict = judge(Combination(strategy="fsdp2", quantization="int8", processes=2))
    assert verdict.changes == {"train.strategy": "zero2"}
    assert "DTensors" in verdict.reason and "8-bit layers" in verdict.reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"processes": 1, "strategy": "zero3"}, "single"),
        ({"processes": 2}, "ddp"),
        ({"processes": 8, "device": "cuda"}, "ddp"),
        ({"processes": 8, "device": "cuda", "offload": "cpu"}, "zero1"),
        ({"processes": 8, "device": "cuda", "offload": "nvme"}, "zero3"),
    ],
)
def test_auto_is_the_first_strategy_that_works(given: dict[str, Any], expected: str) -> None:
    assert strategy(Combination(**given)) == expected


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_shipped_recipes_go_together_everywhere(file: Path) -> None:
    own = {"data.source": [{"text": "a"}]} if file.stem == "in-house" else {}
    shipped = load(file.parent.name, file.stem, shortcuts=own or None)
    for machine in (LAPTOP, TWO, CARDS):
        assert settled(shipped, machine) is shipped


def test_what_goes_together_is_left_as_it_is(tmp_path: Path) -> None:
    for machine in (LAPTOP, TWO, CARDS):
        one = recipe(tmp_path)
        assert settled(one, machine) is one


def test_auto_gives_way_to_what_is_asked_for_and_says_so(tmp_path: Path) -> None:
    found = settled(recipe(tmp_path, train__offload="nvme"), CARDS)
    assert found.settings.train.strategy == "zero3"
    assert found.origins["train.strategy"] == SOLVER
    assert found.notes == [
        "train.strategy=zero3: only ZeRO-3 offloads to NVMe; plain data parallelism has no offload"
    ]
    assert "zero3" in found.to_yaml() and "# solver" in found.to_yaml()
    assert settled(found, CARDS) is found


def test_a_default_is_changed_and_says_so(tmp_path: Path) -> None:
    found = settled(recipe(tmp_path, "adapter: {method: adamix}\n", stage="dpo"), LAPTOP)
    assert found.settings.adapter.model_dump()["consistency"] is False
    assert found.notes == [f"adapter.consistency=false: {judge(Combination(**HITS['consistency'])).reason}"]


@pytest.mark.parametrize(
    ("machine", "settings", "words"),
    [
        (
            TWO,
            {"train__strategy": "fsdp2", "train__offload": "cpu"},
            ["train.strategy", "train.offload=cpu", "train.strategy=zero3"],
        ),
        (LAPTOP, {"train__strategy": "zero3"}, ["train.strategy", "1 process", "train.processes=2 or more"]),
        (TWO, {"train__strategy": "single"}, ["2 processes", "train.processes=1"]),
        (
            TWO,
            {"train__strategy": "zero3", "model__quantization": "int8"},
            ["int8", "order of magnitude", "train.strategy=zero2"],
        ),
        (
            TWO,
            {"train__strategy": "zero2", "train__optimizer": "adafactor"},
            ["adafactor", "rows and columns", "train.optimizer=adamw"],
        ),
        (LAPTOP, {"train__offload": "cpu"}, ["train.offload", "train.processes=2 or more"]),
    ],
)
def test_pain_09_what_is_asked_for_and_does_not_go_together_is_refused(
    machine: Machine, settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        settled(recipe(tmp_path, **settings), machine)
    [problem] = caught.value.problems
    assert all(word in str(problem) for word in words), str(problem)


def test_what_the_recipe_file_says_is_asked_for_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.strategy=zero3"):
        settled(recipe(tmp_path, "train: {strategy: fsdp2}\nadapter: {method: pissa}\n"), TWO)


def test_keys_are_those_of_recipes(tmp_path: Path) -> None:
    values = recipe(tmp_path, "adapter: {method: adamix}\n").values()
    for key in KEYS.values():
        section, name = key.split(".")
        assert name in values[section], key
    assert {key for rule in RULES for key in rule.changes} <= set(KEYS.values())
    facts = replace(Combination(), strategy="ddp").facts()
    assert all(name in facts for rule in RULES for name in rule.when)
