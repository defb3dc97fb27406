"""Every shipped recipe of continued pretraining: it loads, and gives the source of every value."""

import re

import pytest

from finetune.recipe.bases import bases
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import adapter_settings, load, stage_settings

FILES = sorted((PROJECT / "recipes" / "pretrain").glob("*.yaml"))
ORDER = ["stage", "description", "model", "data", "adapter", "train", "evaluate"]
VALUE = re.compile(r"^  (\w+): (\S.*?)(\s+# (.+))?$")
ROWS = [{"text": "a"}]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_loads(file):
    given = {"data.source": ROWS} if file.stem == "in-house" else None
    recipe = load("pretrain", file.stem, shortcuts=given)
    assert 20 < len(recipe.description) <= 110 and recipe.notes == []
    assert recipe.settings.model.base in bases()


def test_your_own_corpus_is_asked_for():
    with pytest.raises(UserError, match=r"set data\.source \(or --data\)"):
        load("pretrain", "in-house")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_value_carries_its_source(file):
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith(" ")]
    assert len(lines) >= 10
    for line in lines:
        match = VALUE.match(line)
        assert match and match[4] and len(match[4]) > 8, f"{file.name}: no source behind {line!r}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sections_and_keys_stand_in_one_order(file):
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == ORDER
    method = re.search(r"^  method: (\w+)", text, re.MULTILINE)[1]
    for section in ORDER[2:]:
        fields = stage_settings("pretrain").model_fields[section].annotation
        known = list((adapter_settings(method) if section == "adapter" else fields).model_fields)
        written = re.findall(r"^  (\w+):", text.split(f"\n{section}:\n")[1].split("\n\n")[0], re.MULTILINE)
        assert written == sorted(written, key=known.index), f"{file.name}: {section}"


def test_published_numbers():
    train = load("pretrain", "pcp").settings.train
    assert (train.betas, train.warmup, train.weight_decay) == ([0.9, 0.98], 0.06, 0.01)


def test_the_separator_belongs_to_the_recipe_s_own_texts():
    recipe = load("pretrain", "quickstart", shortcuts={"data.source": ROWS})
    assert recipe.settings.data.separator is None and recipe.settings.data.held_out == 0
    assert any(note.startswith("data.separator=") and "left out" in note for note in recipe.notes)
    kept = load(
        "pretrain", "quickstart", shortcuts={"data.source": ROWS}, overrides=["data.separator=\\n\\n"]
    )
    assert kept.settings.data.texts.separator == "\n\n"  # as a shell passes it on: backslash, n


def test_texts_without_a_recipe_s_template():
    assert load("pretrain", "quickstart").settings.data.template == "plain"
    assert load("pretrain", "quickstart").settings.data.loss_on == "all"
