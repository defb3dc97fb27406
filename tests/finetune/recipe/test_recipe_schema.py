"""JSON schema for editors, rows for ``show``, names for ``list``."""

import subprocess
import sys

import jsonschema
import pytest
from ruamel.yaml import YAML

from finetune.recipe.discovery import PROJECT, plugin_names
from finetune.recipe.schema import recipe_descriptions, recipe_schema, setting_rows


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(recipe_schema("sft"))


@pytest.mark.parametrize("file", sorted((PROJECT / "recipes/sft").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_fit_it(file):
    jsonschema.validate(
        YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8")), recipe_schema("sft")
    )


@pytest.mark.parametrize(
    ("adapter", "fits"),
    [
        ({}, True),
        ({"rank": 4}, True),
        ({"method": "lora", "rank": 4}, True),
        ({"method": "qlora", "rank": 4}, True),
        ({"method": "prefix", "virtual_tokens": 4}, True),
        ({"method": "full"}, True),
        ({"virtual_tokens": 4}, False),
        ({"method": "prefix", "rank": 4}, False),
        ({"method": "lora", "rank": 0}, False),
        ({"method": "nothing"}, False),
    ],
)
def test_the_adapters_keys_depend_on_its_method(adapter, fits):
    assert (
        jsonschema.Draft202012Validator(recipe_schema("sft")).is_valid({"stage": "sft", "adapter": adapter})
        is fits
    )


def test_every_setting_has_a_description_and_a_default():
    content = recipe_schema("sft")
    sections = {
        name: part for name, part in content["$defs"].items() if name not in ("MixedSource", "RopeSettings")
    }
    assert len(sections) >= 4 + len(plugin_names("finetune.adapters"))
    for name, section in sections.items():
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key}"
            assert "default" in value, f"{name}.{key}"


def test_rows_have_every_value_and_its_origin(workspace):
    recipe = workspace.load("model: {base: ./base}\ndata: {source: rows.jsonl}\n", "train.epochs=2")
    table = setting_rows(recipe)
    assert table[0] == ("model.base", "./base", "my.yaml:1")
    assert ("train.epochs", 2.0, "command line") in table
    assert ("adapter.rank", 16, "default") in table
    assert len(table) == len(recipe.origins)


def test_recipes_are_listed_with_their_descriptions(workspace):
    workspace.write("description: mine\n", "recipes/sft/own.yaml")
    workspace.write("a: [\n", "recipes/sft/wrong.yaml")
    actual = recipe_descriptions("sft")
    assert actual["own"] == "mine"
    assert actual["wrong"].startswith("cannot be read: ")
    assert actual["vicuna"] == "Vicuna: multi-turn ShareGPT conversations, LoRA"


def test_nothing_heavy_is_imported(workspace):
    workspace.write("model: {base: ./base}\ndata: {source: rows.jsonl}\nadapter: {method: qlora}\n")
    code = """
import sys, time
start = time.perf_counter()
from finetune.recipe.recipe import read_recipe
from finetune.recipe.schema import recipe_descriptions, recipe_schema, setting_rows
recipe = read_recipe("sft", "my.yaml", shortcuts={"adapter.method": "prefix"})
setting_rows(recipe), recipe.to_yaml(), recipe.digest(""), recipe_descriptions("sft"), recipe_schema("sft")
heavy = {"torch", "transformers", "peft", "datasets", "trl", "numpy", "pyarrow"} & set(sys.modules)
print(sorted(heavy), time.perf_counter() - start < 5)
"""
    environment = {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "[] True", done.stderr
