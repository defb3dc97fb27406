"""Alternatives for runs that do not fit: they fit, are sorted by cost, and parse as overrides."""

from typing import Any

import pytest

from align.planning.fit import Alternative, alternatives, changed
from align.planning.plan import Plan, plan_of
from finetune.planning.devices import device
from finetune.recipe.recipe import load


def planned(
    gpu: str, count: int = 1, *, stage: str = "sft", name: str = "alpaca", **values: Any
) -> tuple[Plan, list[Alternative]]:
    given = {key.replace("__", "."): value for key, value in values.items()}
    plan = plan_of(load(stage, name, shortcuts=given), device(gpu), count)
    return plan, alternatives(plan, count)


def test_those_that_fit_stand_first_the_cheapest_of_them_first() -> None:
    plan, found = planned("24GB", adapter__method="lora", model__base="llama-2-13b")
    fits = [one.plan.fits for one in found]
    assert not plan.fits and fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    whole = [one.time for one in found if one.plan.fits and not one.learns_other]
    assert whole == sorted(whole)


def test_shorter_rows_come_last_however_fast_they_are() -> None:
    _, found = planned("24GB", adapter__method="lora", model__base="llama-2-13b")
    shorter = [one.learns_other for one in found if one.plan.fits]
    assert shorter == sorted(shorter) and shorter[-1]


@pytest.mark.parametrize(
    ("gpu", "count", "values", "words"),
    [
        ("24GB", 1, {"model__base": "llama-2-13b"}, "model.quantization=nf4"),
        ("t4", 1, {}, "model.precision=float16"),
        ("rtx4090", 1, {"train__micro_batch_size": 64}, "train.micro_batch_size=auto"),
    ],
)
def test_the_cheapest_change(gpu: str, count: int, values: dict[str, Any], words: str) -> None:
    plan, found = planned(gpu, count, **values)
    assert not plan.fits and found[0].plan.fits and words in found[0].words


def test_a_70b_goes_onto_two_cards_of_48_gb_in_4_bits() -> None:
    plan, found = planned("a6000", 2, model__base="llama-2-70b")
    best = found[0]
    assert not plan.fits and best.plan.fits
    assert ("model.quantization", "nf4") in best.changes


def test_a_70b_does_not_go_onto_two_cards_of_24_gb() -> None:
    # Answer.AI (2024-03-06) use their own loader; here each process loads all 4-bit weights.
    plan, found = planned("24GB", 2, model__base="llama-2-70b")
    assert not plan.fits and not any(one.plan.fits for one in found)


def test_the_words_are_taken_by_the_command_line() -> None:
    _, found = planned("24GB", 2, model__base="llama-2-70b")
    for one in found[:4]:
        recipe = load("sft", "alpaca", shortcuts={"model.base": "llama-2-70b"}, overrides=one.words.split())
        assert plan_of(recipe, device("24GB"), 2).peak.total == one.plan.peak.total


def test_checkpointing_costs_an_adapter_half_as_much_again() -> None:
    _, found = planned("rtx4090")
    [one] = [one for one in found if one.changes == (("train.gradient_checkpointing", True),)]
    assert one.time == pytest.approx(1.5, abs=0.01)


def test_nothing_is_proposed_that_the_adapter_cannot() -> None:
    _, of_prefix = planned("24GB", adapter__method="prefix", name="alpaca")
    keys = {key for one in of_prefix for key, _ in one.changes}
    assert "train.gradient_checkpointing" not in keys and "model.quantization" in keys
    _, of_full = planned("80GB", adapter__method="full")
    keys = {key for one in of_full for key, _ in one.changes}
    assert "model.quantization" not in keys and "train.optimizer" in keys


def test_replies_are_shortened_where_they_are_drawn() -> None:
    _, found = planned("24GB", stage="ppo", name="hh")
    shorter = [one for one in found if one.learns_other]
    assert shorter and all("max_length" not in one.words for one in shorter)
    assert any("data.max_prompt_length=" in one.words for one in shorter)


def test_a_step_of_trl_s_gets_fewer_replies_where_they_do_not_fit_at_once() -> None:
    plan, found = planned("a100-80g", stage="grpo", name="gsm8k")
    assert not plan.fits and plan.peak.name == "rollout" and found[0].plan.fits
    assert "train.batch_size" in dict(found[0].changes)


def test_one_card_of_24_gb_draws_fewer_replies_of_a_7b_side_by_side() -> None:
    sources = {"reward__sources": "reward/llama2-two-heads", "data__template": "llama2"}
    plan, found = planned("24GB", stage="ppo", name="hh", model__base="llama-2-7b", **sources)
    assert not plan.fits and plan.peak.name == "rollout"
    assert found[0].plan.fits and "sampling.at_once" in dict(found[0].changes)


def test_fewer_rows_a_pass_are_proposed_on_a_cpu() -> None:
    plan, found = planned("cpu", model__base="smollm2-1.7b")
    rows = {dict(one.changes).get("train.micro_batch_size") for one in found}
    assert rows == {None, plan.rows // 4, 1}
    _, of_kto = planned("cpu", stage="kto", name="quickstart")
    assert {dict(one.changes).get("train.micro_batch_size") for one in of_kto} == {None, 8, 2}


def test_one_process_has_nothing_to_share() -> None:
    _, found = planned("24GB", model__base="llama-2-13b")
    assert not any(key == "train.strategy" for one in found for key, _ in one.changes)


def test_a_changed_recipe_is_another_one() -> None:
    recipe = load("sft", "alpaca")
    other = changed(recipe, [("train.gradient_checkpointing", True), ("model.quantization", "nf4")])
    assert other.settings.train.gradient_checkpointing and other.settings.model.quantization == "nf4"
    assert not recipe.settings.train.gradient_checkpointing
