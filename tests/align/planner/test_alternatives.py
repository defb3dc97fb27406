"""Alternatives for runs that do not fit: they fit, are sorted by cost, and parse as overrides."""

from typing import Any

import pytest

from align.planner.alternatives import Alternative, apply_changes, find_alternatives
from align.planner.plan import Plan, make_plan
from finetune.distributed.hardware import device_by_name
from finetune.recipe.recipe import read_recipe


def plan_with_alternatives(
    gpu: str, count: int = 1, *, stage: str = "sft", name: str = "alpaca", **values: Any
) -> tuple[Plan, list[Alternative]]:
    shortcuts = {key.replace("__", "."): value for key, value in values.items()}
    plan = make_plan(read_recipe(stage, name, shortcuts=shortcuts), device_by_name(gpu), count)
    return plan, find_alternatives(plan, count)


def test_fitting_alternatives_come_first_cheapest_first() -> None:
    plan, alternatives = plan_with_alternatives("24GB", adapter__method="lora", model__base="llama-2-13b")
    fits = [alternative.plan.fits for alternative in alternatives]
    assert not plan.fits and fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    relative_times = [
        alternative.relative_time
        for alternative in alternatives
        if alternative.plan.fits and not alternative.changes_training
    ]
    assert relative_times == sorted(relative_times)


def test_shorter_rows_come_last() -> None:
    _, alternatives = plan_with_alternatives("24GB", adapter__method="lora", model__base="llama-2-13b")
    shorter = [alternative.changes_training for alternative in alternatives if alternative.plan.fits]
    assert shorter == sorted(shorter) and shorter[-1]


@pytest.mark.parametrize(
    ("gpu", "count", "values", "override"),
    [
        ("24GB", 1, {"model__base": "llama-2-13b"}, "model.quantization=nf4"),
        ("t4", 1, {}, "model.precision=float16"),
        ("rtx4090", 1, {"train__micro_batch_size": 64}, "train.micro_batch_size=auto"),
    ],
)
def test_the_cheapest_change(gpu: str, count: int, values: dict[str, Any], override: str) -> None:
    plan, alternatives = plan_with_alternatives(gpu, count, **values)
    assert not plan.fits and alternatives[0].plan.fits and override in alternatives[0].overrides


def test_70b_fits_two_48_gb_gpus_in_4_bit() -> None:
    plan, alternatives = plan_with_alternatives("a6000", 2, model__base="llama-2-70b")
    best = alternatives[0]
    assert not plan.fits and best.plan.fits
    assert ("model.quantization", "nf4") in best.changes


def test_70b_does_not_fit_two_24_gb_gpus() -> None:
    # Answer.AI (2024-03-06) use their own loader; here each process loads all 4-bit weights.
    plan, alternatives = plan_with_alternatives("24GB", 2, model__base="llama-2-70b")
    assert not plan.fits and not any(alternative.plan.fits for alternative in alternatives)


def test_overrides_parse_on_the_command_line() -> None:
    _, alternatives = plan_with_alternatives("24GB", 2, model__base="llama-2-70b")
    for alternative in alternatives[:4]:
        recipe = read_recipe(
            "sft", "alpaca", shortcuts={"model.base": "llama-2-70b"}, overrides=alternative.overrides.split()
        )
        assert make_plan(recipe, device_by_name("24GB"), 2).peak.total == alternative.plan.peak.total


def test_checkpointing_takes_1_5_times_as_long_for_an_adapter() -> None:
    _, alternatives = plan_with_alternatives("rtx4090")
    [alternative] = [
        alternative
        for alternative in alternatives
        if alternative.changes == (("train.gradient_checkpointing", True),)
    ]
    assert alternative.relative_time == pytest.approx(1.5, abs=0.01)


def test_proposals_respect_adapter_traits() -> None:
    _, of_prefix = plan_with_alternatives("24GB", adapter__method="prefix", name="alpaca")
    keys = {key for alternative in of_prefix for key, _ in alternative.changes}
    assert "train.gradient_checkpointing" not in keys and "model.quantization" in keys
    _, of_full = plan_with_alternatives("80GB", adapter__method="full")
    keys = {key for alternative in of_full for key, _ in alternative.changes}
    assert "model.quantization" not in keys and "train.optimizer" in keys


def test_completions_are_shortened_in_generating_stages() -> None:
    _, alternatives = plan_with_alternatives("24GB", stage="ppo", name="hh")
    shorter = [alternative for alternative in alternatives if alternative.changes_training]
    assert shorter and all("max_length" not in alternative.overrides for alternative in shorter)
    assert any("data.max_prompt_length=" in alternative.overrides for alternative in shorter)


def test_trl_steps_get_smaller_batches() -> None:
    plan, alternatives = plan_with_alternatives("a100-80g", stage="grpo", name="gsm8k")
    assert not plan.fits and plan.peak.name == "rollout" and alternatives[0].plan.fits
    assert "train.batch_size" in dict(alternatives[0].changes)


def test_7b_on_24_gb_samples_fewer_completions_in_parallel() -> None:
    sources = {"rewards__sources": "reward/llama2-two-heads", "data__template": "llama2"}
    plan, alternatives = plan_with_alternatives(
        "24GB", stage="ppo", name="hh", model__base="llama-2-7b", **sources
    )
    assert not plan.fits and plan.peak.name == "rollout"
    assert alternatives[0].plan.fits and "sampling.generation_batch_size" in dict(alternatives[0].changes)


def test_smaller_micro_batches_are_proposed_on_a_cpu() -> None:
    plan, alternatives = plan_with_alternatives("cpu", model__base="smollm2-1.7b")
    rows = {dict(alternative.changes).get("train.micro_batch_size") for alternative in alternatives}
    assert rows == {None, plan.micro_batch_size // 4, 1}
    _, of_kto = plan_with_alternatives("cpu", stage="kto", name="quickstart")
    assert {dict(alternative.changes).get("train.micro_batch_size") for alternative in of_kto} == {None, 4, 2}


def test_one_process_gets_no_strategy() -> None:
    _, alternatives = plan_with_alternatives("24GB", model__base="llama-2-13b")
    assert not any(key == "train.strategy" for alternative in alternatives for key, _ in alternative.changes)


def test_changes_copy_the_recipe() -> None:
    recipe = read_recipe("sft", "alpaca")
    other = apply_changes(recipe, [("train.gradient_checkpointing", True), ("model.quantization", "nf4")])
    assert other.settings.train.gradient_checkpointing and other.settings.model.quantization == "nf4"
    assert not recipe.settings.train.gradient_checkpointing
