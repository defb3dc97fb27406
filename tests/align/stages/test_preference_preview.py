"""``llm-align data`` on preferences: every completion behind its prompt, called what it is."""

from collections.abc import Callable
from pathlib import Path

from align.cli.data_preview import preview
from finetune.recipe.recipe import Recipe, read_recipe

Recipes = Callable[..., Recipe]


def test_a_pair_is_shown_with_both_completions(dpo_recipe: Recipes) -> None:
    facts = preview(dpo_recipe(train__max_steps=None), rows=2)
    assert [row["where"].split(", ")[1] for row in facts["shown"]] == ["chosen", "rejected"] * 2
    first, second = facts["shown"][:2]
    assert [piece["trained"] for piece in first["pieces"]] == [False, True]
    assert first["pieces"][0] == second["pieces"][0] and first["pieces"][1] != second["pieces"][1]
    assert first["pieces"][1]["text"].endswith("</s>")
    assert (facts["rows"], facts["steps"]) == (42, 6) and facts["token_budget"] == facts["tokens"]
    assert sum(bar["rows"] for bar in facts["lengths"]["histogram"]) == 84


def test_a_ranked_list_is_shown_by_rank(dpo_recipe: Recipes, lists_file: Path) -> None:
    facts = preview(dpo_recipe(data__source=str(lists_file), data__held_out=0), rows=1)
    assert [row["where"].split(", ", 1)[1] for row in facts["shown"]] == [
        "rank 1 of 3, score 3",
        "rank 2 of 3, score 1.5",
        "rank 3 of 3, score 0",
    ]


def test_labels_are_shown_for_kto(pairs_file: Path, base_folder: Path) -> None:
    given = {"model.base": str(base_folder), "data.source": str(pairs_file), "data.held_out": 0}
    recipe = read_recipe(
        "kto", "kto-mix", shortcuts={**given, "data.max_length": 128, "data.template": "alpaca"}
    )
    facts = preview(recipe, rows=4)
    assert {row["where"].split(", ")[1] for row in facts["shown"]} <= {"good", "bad"}
    assert facts["rows"] == 96 and len(facts["shown"]) == 4


def test_a_stage_that_writes_conversations_itself_shows_them(pairs_file: Path, base_folder: Path) -> None:
    given = {"model.base": str(base_folder), "data.source": str(pairs_file), "data.held_out": 4}
    recipe = read_recipe("chain_of_hindsight", "quickstart", shortcuts=given)
    [row] = preview(recipe, rows=1)["shown"]
    controls = recipe.settings.chain_of_hindsight
    text = "".join(piece["text"] for piece in row["pieces"])
    assert controls.good in text and controls.bad in text and row["trained_tokens"] > 0
