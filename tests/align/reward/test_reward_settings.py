"""Reward recipes: contradictory settings are reported at once, with a repair."""

from pathlib import Path

import pytest

from align.reward.settings import Settings, head_indices
from finetune.adapters import lora
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, read_recipe

ROWS = "recipes/tiny/data/preferences_train.jsonl"
OTHERS = "recipes/tiny/data/preferences_held_out.jsonl"


def recipe(*words: str) -> Recipe:
    return read_recipe("reward", "quickstart", overrides=["data.held_out=0.1", *words])


def problems(*words: str) -> list[tuple[str, str]]:
    with pytest.raises(UserError) as caught:
        recipe(*words)
    return [(problem.where.split(" ")[0], str(problem)) for problem in caught.value.problems]


def mix(*parts: str) -> str:
    return f"data.mix=[{', '.join(parts)}]"


def two(first: str, second: str) -> str:
    return mix(f"{{source: {ROWS}{first}}}", f"{{source: {OTHERS}{second}}}")


HEADS = "reward.heads=[help, safety]"


def test_each_source_trains_its_head() -> None:
    settings = recipe(HEADS, two(", head: safety", ", head: help"), "data.source=null").settings
    assert isinstance(settings, Settings) and head_indices(settings) == [1, 0]
    single = recipe().settings
    assert isinstance(single, Settings) and head_indices(single) == [0]


@pytest.mark.parametrize(
    ("words", "where", "told"),
    [
        ([HEADS], "reward.heads", "2 heads, but data.source is a single source"),
        ([HEADS, two(", head: help", "")], "data.mix[1].head", "missing, and there are 2 heads"),
        ([HEADS, two(", head: help", ", head: safty")], "data.mix[1].head", "did you mean 'safety'?"),
        ([HEADS, two(", head: help", ", head: help")], "reward.heads", "no data source for safety"),
        (["reward.heads=[a, a]"], "reward.heads", "unique names"),
        ([two(", head: other", "")], "data.mix[0].head", "unknown head 'other'"),
        (["data.packing=true"], "data.packing", "share their prompt's row"),
        (["evaluate.exact_match=5"], "evaluate.exact_match", "generate no text"),
        (["train.neftune_alpha=5.0"], "train.neftune_alpha", "not supported for reward models"),
        (["adapter.method=llama_adapter"], "adapter.method", "PEFT cannot save a trained score head"),
        (["reward.center_rewards_coefficient=-1.0"], "reward.center_rewards_coefficient", "0"),
        (["reward.margin_scale=0.0"], "reward.margin_scale", "0"),
    ],
)
def test_contradictions_are_reported(words: list[str], where: str, told: str) -> None:
    more = ["data.source=null"] if any(word.startswith("data.mix") for word in words) else []
    reported = problems(*words, *more)
    assert any(place == where and told in text for place, text in reported), reported


def test_a_held_out_file_has_no_heads() -> None:
    words = [HEADS, two(", head: help", ", head: safety"), "data.source=null", f"data.held_out={ROWS}.x"]
    assert "data.held_out" in {place for place, _ in problems(*words)}


def test_rules_are_checked_with_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text("def good(prompt, completion):\n    return 1.0\n\ndef few(prompt):\n    return 1.0\n")
    fine = recipe(f"reward.rules=[{{name: good, function: '{file}:good'}}]").settings
    assert isinstance(fine, Settings) and fine.reward.rules[0].weight == 1.0
    reported = problems(
        f"reward.rules=[{{name: a, function: '{file}:god'}}, {{name: b, function: '{file}:few'}}, "
        f"{{name: b, function: '{file}.py:good'}}, {{name: reward, function: '{file}:good'}}]"
    )
    message = "\n".join(text for _, text in reported)
    assert "did you mean 'good'?" in message and "few(prompt) takes no `completion`" in message
    assert (
        "does not exist" in message
        and "duplicate name 'reward'" in message
        and "duplicate name 'b'" in message
    )


def test_adapters_keep_their_own_settings() -> None:
    settings = recipe("adapter.rank=3").settings
    assert isinstance(settings.adapter, lora.Settings) and settings.adapter.rank == 3
