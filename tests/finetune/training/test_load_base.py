"""A base is loaded completely or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MODELS, make
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.distributed.hardware import detect_hardware
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.model import context_length, load_base

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def with_value(base: Path, folder: Path, value: float) -> Path:
    """Return a copy of a base, one element of which has the value."""
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights[WEIGHT][1, 2] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, *, precision: str = "float32", quantization: str = "none", **settings: str):
    model = ModelSettings(base=str(folder), **settings)
    return load_base(model, precision=precision, quantization=quantization, hardware=detect_hardware())


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_the_file_s_and_frozen(tmp_path: Path, name: str) -> None:
    saved = make(name)
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert not any(weight.requires_grad for weight in loaded.parameters())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_tied_embeddings_are_not_missing(tmp_path: Path, quantization: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=96, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path, quantization=quantization)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_missing_weight_is_refused(base_folder: Path, tmp_path: Path, quantization: str) -> None:
    for file in base_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of the weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path, quantization=quantization)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_weight_that_is_not_finite_is_named(
    base_folder: Path, tmp_path: Path, quantization: str, value: float
) -> None:
    folder = with_value(base_folder, tmp_path, value)
    with pytest.raises(UserError) as error:
        load(folder, quantization=quantization)
    assert "1 of its " in str(error.value) and str(error.value).count(WEIGHT) == 1


def test_a_weight_beyond_the_range_of_float16_names_the_precision(base_folder: Path, tmp_path: Path) -> None:
    folder = with_value(base_folder, tmp_path, 1e5)
    load(folder)
    load(folder, precision="bfloat16")
    with pytest.raises(UserError, match=rf"{WEIGHT}(.|\n)*model\.precision=bfloat16"):
        load(folder, precision="float16")


def test_precision_and_attention_are_applied(base_folder: Path) -> None:
    model = load(base_folder, precision="bfloat16", attention="eager")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_context_is_read_from_the_config_alone(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    assert context_length(ModelSettings(base=str(tmp_path))) == 256
