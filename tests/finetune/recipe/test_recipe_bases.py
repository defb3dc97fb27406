"""Short names of base models."""

import re

import pytest

from finetune.recipe import bases as table
from finetune.recipe.bases import load_bases, resolve_base
from finetune.recipe.errors import UserError

EXPECTED_BASES = [
    "tiny",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-7b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "gemma-2-2b",
    "gemma-2-9b",
    "gemma-3-1b",
    "gemma-3-4b",
    "polyglot-ko-1.3b",
    "polyglot-ko-3.8b",
    "polyglot-ko-5.8b",
    "polyglot-ko-12.8b",
    "pythia-70m",
    "pythia-160m",
    "pythia-410m",
    "pythia-1b",
    "pythia-1.4b",
    "pythia-2.8b",
    "pythia-6.9b",
    "pythia-12b",
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "smollm2-135m-instruct",
    "smollm2-360m-instruct",
    "smollm2-1.7b-instruct",
    "smollm3-3b",
    "smollm3-3b-chat",
    "qwen2.5-0.5b",
    "qwen2.5-0.5b-instruct",
    "qwen2.5-1.5b",
    "qwen2.5-1.5b-instruct",
    "qwen2.5-3b",
    "qwen2.5-3b-instruct",
    "qwen2.5-7b",
    "qwen2.5-7b-instruct",
    "qwen2.5-14b",
    "qwen2.5-14b-instruct",
    "qwen3-0.6b-chat",
    "qwen3-1.7b-chat",
    "qwen3-4b-chat",
    "qwen3-8b-chat",
    "qwen3-4b-instruct-2507",
    "llama-3.2-1b",
    "llama-3.2-1b-instruct",
    "llama-3.2-3b",
    "llama-3.2-3b-instruct",
    "gemma-3-270m",
    "gemma-3-270m-it",
    "gemma-3-1b-it",
    "olmo-2-1b",
    "olmo-2-1b-instruct",
    "olmo-2-7b",
    "olmo-2-7b-instruct",
    "exaone-4.0-1.2b",
    "mistral-7b-instruct",
    "mistral-nemo",
    "mistral-nemo-instruct",
]


def test_the_table_is_complete():
    assert list(load_bases()) == EXPECTED_BASES
    for name, base in load_bases().items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", base.id) or name == "tiny"
        assert re.fullmatch(r"\d+(\.\d)?[MB]", base.parameters), name
        assert base.note, name


@pytest.mark.parametrize("name", [name for name in EXPECTED_BASES if name != "tiny"])
def test_a_short_name_resolves_to_a_hub_id_of_its_size(name):
    identifier = resolve_base(name)
    assert identifier == load_bases()[name].id
    # The model's name and size; Qwen3 and SmolLM3 do not say in the id that they chat.
    assert all(part in identifier.lower() for part in name.removesuffix("-chat").split("-"))


def test_tiny_is_a_folder_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PROJECT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve_base("tiny")
    assert "'tiny' is the folder recipes/tiny/model, which does not exist" in str(caught.value)
    (tmp_path / "project/recipes/tiny/model").mkdir(parents=True)
    (tmp_path / "project/recipes/tiny/model/config.json").write_text("{}")
    assert resolve_base("tiny") == str(tmp_path / "project/recipes/tiny/model")


def test_a_folder_and_a_hub_id_resolve_to_themselves(workspace, monkeypatch):
    assert resolve_base("base") == "base"
    assert resolve_base("owner/name") == "owner/name"
    monkeypatch.setenv("HOME", str(workspace.folder))
    assert resolve_base("~/base") == str(workspace.folder / "base")


def test_the_closest_name_is_suggested():
    with pytest.raises(UserError, match="did you mean 'qwen3-0.6b'"):
        resolve_base("qwen-0.6b")
    with pytest.raises(UserError) as caught:
        resolve_base("nobody")
    assert str(caught.value) == (
        "model.base: 'nobody' is neither a short name nor a folder\n"
        "    expected: a short name (tiny, llama-2-7b, llama-2-13b, ...), a Hub id (owner/name), "
        "or a folder with config.json\n"
        "    repair:   `llm-align list bases` lists all 67 short names"
    )
