"""The folder is the registry: recipes and plug-ins by file name, the user's recipes first."""

import sys

import pytest

from finetune.recipe.discovery import (
    PROJECT,
    find_recipe,
    load_plugin,
    load_stage,
    plugin_names,
    plugin_summary,
    recipe_names,
)
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe

MINE = "description: mine\nmodel: {base: ./base}\ndata: {source: rows.jsonl}\n"


def test_a_users_recipe_takes_precedence_over_the_shipped_one(workspace):
    assert find_recipe("sft", "alpaca") == PROJECT / "recipes" / "sft" / "alpaca.yaml"
    workspace.write(MINE, "recipes/sft/alpaca.yaml")
    workspace.write(MINE, "recipes/sft/own.yaml")
    assert read_recipe("sft", "alpaca").description == "mine"
    assert read_recipe("sft", "own").origins["model.base"] == "own.yaml:2"
    assert "vicuna" in recipe_names("sft")


def test_a_path_is_a_recipe_too(workspace):
    workspace.write(MINE, "sub/x.yml")
    assert read_recipe("sft", "sub/x.yml").name == "x"


@pytest.mark.parametrize(
    ("stage", "name", "fragments"),
    [
        (
            "sft",
            "alpacca",
            ["recipe 'alpacca'", "stage sft has no such recipe", "quickstart", "did you mean 'alpaca'?"],
        ),
        ("sft", "zzz", ["stage sft has no such recipe", "see `llm-align list`"]),
        ("sft", "sub/min.yaml", ["sub/min.yaml: no such file", "did you mean 'sub/mine.yaml'?"]),
        ("sft", "sub/other.yaml", ["sub/other.yaml: no such file", "sub contains mine.yaml"]),
        ("sft", "nowhere/x.yaml", ["no such file", "folder nowhere does not exist"]),
        ("sft", "base/x.yaml", ["no such file", "folder base contains no .yaml file"]),
        ("sftt", "alpaca", ["stage: 'sftt' is unknown", "sft", "did you mean 'sft'?"]),
    ],
)
def test_an_unknown_recipe_lists_what_exists(workspace, stage, name, fragments):
    workspace.write(MINE, "sub/mine.yaml")
    with pytest.raises(UserError) as caught:
        read_recipe(stage, name)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_recipe_of_another_stage_is_suggested(workspace, monkeypatch):
    monkeypatch.setattr(
        "finetune.recipe.discovery.stage_names", lambda: {"sft": "finetune.stages", "dpo": "x"}
    )
    with pytest.raises(UserError, match="stage sft has one: llm-align sft alpaca"):
        find_recipe("dpo", "alpaca")


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "plugs"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text('"""What it is,\non two lines.\n\nMore.\n"""\nVALUE = 1\n')
    (folder / "broken.py").write_text('"""Broken."""\nimport a_module_that_is_not_there\n')
    (folder / "_helper.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "plugs"
    for name in [name for name in sys.modules if name.split(".")[0] == "plugs"]:
        del sys.modules[name]


def test_a_new_file_is_a_new_plugin(package):
    assert plugin_names(package) == ["broken", "good"]
    assert load_plugin(package, "good", where="x").VALUE == 1


def test_an_error_inside_a_plugin_is_not_called_unknown(package):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_plugin(package, "broken", where="x")


def test_an_unknown_plugin_lists_what_exists(package):
    with pytest.raises(UserError) as caught:
        load_plugin(package, "goood", where="adapter.method")
    expected = "adapter.method: 'goood' is unknown\n    expected: one of broken, good (plugs/)\n"
    assert str(caught.value) == expected + "    repair:   did you mean 'good'?"


def test_a_summary_is_read_without_importing(package):
    assert plugin_summary(package, "good") == "What it is, on two lines."
    assert plugin_summary(package, "broken") == "Broken."
    assert "plugs.broken" not in sys.modules and "plugs.good" not in sys.modules


def test_stages_are_found_in_both_layers():
    assert load_stage("sft").__name__ == "finetune.stages.sft"
