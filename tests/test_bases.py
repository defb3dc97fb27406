"""Toy models with the configs of the short names: they train, are saved, and are planned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ROWS, SETTINGS, SIZES, TINY, VOCABULARY, WORKS, train_toy
from safetensors.torch import load_file
from test_families import RESULTS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align import load_recipe, plan
from finetune.recipe import yaml_file
from finetune.recipe.base_config import ARCHITECTURES
from finetune.recipe.bases import load_bases

TABLE: dict[str, Any] = yaml_file.read_yaml(ARCHITECTURES)[0]
WINDOW = 32


def toy_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the sizes of a toy: ratios of heads, windows, ties and biases are kept."""
    values = {key: SIZES.get(key, value) for key, value in config.items()}
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads is not None:
        values["num_key_value_heads"] = 4 if kv_heads == heads else min(2, kv_heads)
    if config.get("sliding_window"):
        values["sliding_window"] = WINDOW
    if "layer_types" in config:
        values["layer_types"] = config["layer_types"][: SIZES["num_hidden_layers"]]
    return values | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def toys() -> dict[str, dict[str, Any]]:
    """Return one toy for each kind of config, by the first base that has it."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, entry in TABLE.items():
        # The text model of images and text has a config of its own, gemma3_text.
        if entry["config"]["model_type"] != "gemma3":
            values = toy_values(entry["config"])
            kinds.setdefault(json.dumps(values, sort_keys=True), (name, values))
    return dict(kinds.values())


def test_every_base_is_of_a_family_that_trains() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    types = {entry["config"]["model_type"] for entry in TABLE.values()} - {"gemma3"}
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "smollm3", "exaone4"} <= types
    assert {result for name in types for result in results[name].values()} == {WORKS}


def test_a_note_has_the_license_and_says_what_chats() -> None:
    licenses = (
        "Apache-2.0",
        "MIT",
        "gated; Llama",
        "gated; Gemma",
        "Qwen Research",
        "EXAONE AI Model License",
    )
    for name, base in load_bases().items():
        assert name == "tiny" or base.note.startswith(licenses), name
        chats = name.endswith(("-instruct", "-it", "-chat", "-2507")) or "no base model" in base.note
        assert ("chat model" in base.note) == chats, name


@pytest.mark.slow
@pytest.mark.parametrize("name", toys())
def test_a_toy_of_the_config_trains_and_is_planned(name: str, tmp_path: Path) -> None:
    values = dict(toys()[name])
    assert values["vocab_size"] == VOCABULARY
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(tmp_path / "base")
    train_toy("sft", tmp_path / "base", tmp_path / "run", ROWS)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    recipe = load_recipe(
        str(tmp_path / "run.yaml"), base=str(tmp_path / "base"), data=ROWS, settings=SETTINGS
    )
    planned = plan(recipe)
    assert planned.estimate.trainable == sum(weight.numel() for weight in saved.values())
    assert planned.estimate.workload.architecture.parameters == model.num_parameters()
