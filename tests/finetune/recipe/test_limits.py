"""Numbers of a shipped recipe are limits that scale to the user's rows; typed ones are never changed."""

import json
from math import ceil
from pathlib import Path

import pytest
import yaml

from finetune.recipe.discovery import PROJECT
from finetune.recipe.limits import AtMost, fit_to_rows, limit_keys, scaled_held_out, setting, with_values
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.settings import StageSettings
from finetune.training.auto_values import max_length


def steps_of(num_rows: int):  # noqa: ANN201
    def count(settings: StageSettings) -> int:
        train = settings.train
        return train.max_steps or ceil(ceil(num_rows / train.batch_size) * train.epochs)

    return count


def fitted(recipe: Recipe, num_rows: int) -> dict[str, tuple[float, float]]:
    _, changes = fit_to_rows(recipe.settings, num_rows, steps_of(num_rows))
    return {change.key: (change.before, change.after) for change in changes}


def load(stage: str, name: str, *overrides: str) -> Recipe:
    return read_recipe(stage, name, shortcuts={"data.source": [{"prompt": "a"}]}, overrides=overrides)


def test_a_shipped_recipe_fits_59_rows_and_its_own_data() -> None:
    recipe = load("dpo", "hh")
    assert scaled_held_out(59, recipe.settings.data.held_out)[0] == 6
    assert fitted(recipe, 53) == {"train.batch_size": (64, 4), "train.warmup": (150, 2)}
    assert fitted(recipe, 160_000) == {}
    assert scaled_held_out(160_000, recipe.settings.data.held_out) == (256, None)


@pytest.mark.parametrize(
    ("stage", "name", "num_rows", "expected"),
    [
        # Halved until there are 20 steps, and not below 4 rows.
        ("sft", "alpaca", 200, {"train.batch_size": (128, 32)}),
        ("sft", "alpaca", 7, {"train.batch_size": (128, 4)}),
        ("dpo", "pro", 60, {"train.batch_size": (112, 7)}),
        # A number of steps is at most three epochs.
        ("sft", "guanaco", 59, {"train.batch_size": (16, 8), "train.max_steps": (1875, 24)}),
        ("reward", "hh", 500, {"train.batch_size": (64, 16), "train.evaluate_every": (250, 8)}),
        ("kto", "kto-mix", 10, {"train.batch_size": (16, 4)}),
    ],
)
def test_limits_of_other_recipes(
    stage: str, name: str, num_rows: int, expected: dict[str, tuple[int, int]]
) -> None:
    assert fitted(load(stage, name), num_rows) == expected


def test_what_was_typed_is_not_changed() -> None:
    recipe = load("dpo", "hh", "train.batch_size=64", "train.warmup=150", "data.held_out=256")
    assert fitted(recipe, 53) == {} and scaled_held_out(59, recipe.settings.data.held_out) == (256, None)
    # A typed number of steps is not more with a smaller batch; the recipe's warm-up still fits it.
    assert fitted(load("dpo", "hh", "train.max_steps=30"), 53) == {"train.warmup": (150, 3)}
    # Typed epochs win over the recipe's number of steps.
    epochs = load("sft", "guanaco", "train.epochs=2")
    assert epochs.settings.train.max_steps is None
    assert [note.partition(" is ignored: ")[2] for note in epochs.notes if "max_steps" in note] == [
        "train.epochs is set"
    ]
    # Complete micro-batches of the user's size.
    assert fitted(load("sft", "alpaca", "train.micro_batch_size=32"), 200) == {"train.batch_size": (128, 32)}
    assert fitted(load("sft", "alpaca", "train.micro_batch_size=64"), 100)["train.batch_size"] == (128, 64)


def test_an_own_recipe_is_typed_and_a_run_remembers_its_limits(tmp_path: Path) -> None:
    shipped = yaml.safe_load((PROJECT / "recipes" / "dpo" / "hh.yaml").read_text(encoding="utf-8"))
    own = tmp_path / "hh.yaml"
    own.write_text(yaml.safe_dump(shipped), encoding="utf-8")
    recipe = read_recipe("dpo", str(own))
    assert not isinstance(recipe.settings.train.batch_size, AtMost) and recipe.settings.train.batch_size == 64
    run = tmp_path / "run"
    run.mkdir()
    original = read_recipe("dpo", "hh", overrides=["train.warmup=10"])
    assert original.values()["data"]["held_out"] == 256
    (run / "recipe.yaml").write_text(original.to_yaml(), encoding="utf-8")
    record = {"status": "finished", "digest": "0", "recipe": "hh", "limits": limit_keys(original.settings)}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    again = read_recipe("dpo", str(run / "recipe.yaml"))
    assert limit_keys(again.settings) == limit_keys(original.settings)
    assert again.digest("rows") == original.digest("rows")
    assert not isinstance(again.settings.train.warmup, AtMost)


def test_lengths_of_a_recipe_fit_the_model() -> None:
    assert max_length(AtMost(2048), context=512, virtual_tokens=20) == (
        492,
        "2048 in the recipe; the model has 512 positions, the adapter takes 20",
    )
    # The recipe's prompts (256) leave no completion in 256 tokens: they are scaled, and not refused.
    assert setting(load("dpo", "hh", "data.max_length=256").settings, "data.max_prompt_length") == 256


def test_ppo_samples_no_prompt_twice_in_a_rollout() -> None:
    settings = with_values(
        read_recipe("ppo", "quickstart").settings,
        {"ppo.rollout_size": AtMost(512), "train.batch_size": AtMost(128), "train.epochs": 100.0},
    )
    small, changes = fit_to_rows(settings, 59, lambda settings: 100)
    assert (setting(small, "ppo.rollout_size"), small.train.batch_size) == (32, 32)
    assert [change.line() for change in changes] == [
        "ppo.rollout_size 512 → 32: there are 59 training prompts",
        "train.batch_size 128 → 32: a rollout has 32 completions",
    ]
