"""The shipped recipes of continued pretraining: published numbers, and the user's texts."""

import pytest

from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe

ROWS = [{"text": "a"}]


def test_a_corpus_is_required():
    with pytest.raises(UserError, match=r"set data\.source \(or --data\)"):
        read_recipe("pretrain", "in-house")


def test_published_numbers():
    train = read_recipe("pretrain", "pcp").settings.train
    assert (train.betas, train.warmup, train.weight_decay) == ([0.9, 0.98], 0.06, 0.01)


def test_the_separator_applies_to_the_recipes_texts_only():
    recipe = read_recipe("pretrain", "quickstart", shortcuts={"data.source": ROWS})
    assert recipe.settings.data.separator is None and recipe.settings.data.held_out == 0
    assert any(note.startswith("data.separator=") and "ignored" in note for note in recipe.notes)
    selected = read_recipe(
        "pretrain", "quickstart", shortcuts={"data.source": ROWS}, overrides=["data.separator=\\n\\n"]
    )
    assert selected.settings.data.text_format.separator == "\n\n"  # as a shell passes it on: backslash, n


def test_texts_without_a_recipe_s_template():
    assert read_recipe("pretrain", "quickstart").settings.data.template == "plain"
    assert read_recipe("pretrain", "quickstart").settings.data.loss_on == "all"
