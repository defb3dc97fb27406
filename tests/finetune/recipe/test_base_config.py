"""Stored quantization of a base: every format of config.json is read, and damaged ones are refused."""

from typing import Any

import pytest
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune.recipe.base_config import StoredQuantization, stored_quantization
from finetune.recipe.errors import UserError

BNB = {"quant_method": "bitsandbytes"}
NF4 = {**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (NF4, "bitsandbytes 4-bit (nf4, without double quantization)"),
        (NF4 | {"bnb_4bit_use_double_quant": True}, "bitsandbytes 4-bit (nf4, with double quantization)"),
        ({"load_in_4bit": True}, "bitsandbytes 4-bit (fp4, without double quantization)"),
        ({**BNB, "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4-bit"),
        ({"quant_method": "awq", "w_bit": 4}, "awq 4-bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_formats(content: dict[str, Any], expected: str, place: str) -> None:
    section = {"quantization_config": content}
    stored = stored_quantization(section if place == "top" else {"text_config": section})
    assert str(stored) == expected
    assert stored is not None and bool(stored.quantization) == expected.startswith("bitsandbytes")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": None}])
def test_unquantized(config: dict[str, Any]) -> None:
    assert stored_quantization(config) is None


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_what_transformers_saves_is_read(options: dict[str, bool]) -> None:
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    saved = BitsAndBytesConfig(**options, **double, llm_int8_skip_modules=["lm_head"])
    stored = stored_quantization({"quantization_config": saved.to_dict()})
    assert stored is not None and stored.skip_modules == ("lm_head",)
    if "load_in_4bit" in options:
        assert (stored.double_quantization, stored.compute_dtype) == (True, "bfloat16")


@pytest.mark.parametrize(
    "content",
    [
        "nf4",
        [],
        {},
        BNB,
        {"quant_method": 4},
        NF4 | {"load_in_4bit": "yes"},
        NF4 | {"load_in_8bit": True},
        NF4 | {"bnb_4bit_quant_type": "int4"},
        NF4 | {"bnb_4bit_quant_type": ["nf4"]},
        NF4 | {"bnb_4bit_use_double_quant": 1},
        NF4 | {"bnb_4bit_compute_dtype": "half"},
        NF4 | {"llm_int8_skip_modules": "lm_head"},
        NF4 | {"llm_int8_skip_modules": ["("]},
    ],
)
def test_damaged_configs_are_refused(content: Any) -> None:
    with pytest.raises(UserError, match=r"model\.base: config\.json has quantization_config.*\n.*expected"):
        stored_quantization({"quantization_config": content})


def test_skipped_modules_are_those_of_transformers() -> None:
    patterns = ("lm_head", "model.layers.1.mlp", r"model\.layers\.2.*\.q_proj", "o_proj")
    stored = StoredQuantization("bitsandbytes", "nf4", "nf4", skip_modules=patterns)
    blocks = ("mlp.up_proj", "self_attn.q_proj", "self_attn.o_proj")
    modules = [f"model.layers.{index}.{block}" for index in (1, 2, 11) for block in blocks]
    skipped = {name for name in modules if stored.skips(name)}
    assert skipped == {name for name in modules if not should_convert_module(name, list(patterns))}
    assert len(skipped) == 5


@pytest.mark.parametrize(
    ("supported", "expected"),
    [(("none",), "an unquantized base"), (("none", "int8"), "an unquantized base, or one in int8")],
)
def test_an_adapter_that_cannot_train_on_a_stored_base(supported: tuple[str, ...], expected: str) -> None:
    stored = stored_quantization({"quantization_config": NF4})
    assert stored is not None
    with pytest.raises(UserError, match="which this adapter does not train on") as error:
        stored.check("auto", supported)
    assert error.value.problems[0].expected == expected
