"""The internals of libraries that the project uses: an upgrade that changes one of them fails here."""

import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from accelerate.state import AcceleratorState, PartialState
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from finetune import library_internals

SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.25))


def test_the_attention_implementation_is_that_of_the_loaded_model(llama: LlamaForCausalLM) -> None:
    assert library_internals.attention_implementation(LlamaConfig(**SMALL)) is None
    assert library_internals.attention_implementation(llama.config) == "sdpa"


def test_architectures_with_a_recurrent_state_are_flagged() -> None:
    assert library_internals.has_recurrent_state(MambaForCausalLM)
    assert not library_internals.has_recurrent_state(LlamaForCausalLM)


def test_attention_dropout_is_what_the_forward_pass_reads(llama: LlamaForCausalLM) -> None:
    ids = torch.arange(8)[None]
    llama.train()
    assert not torch.equal(llama(ids).logits, llama(ids).logits)
    removed = [library_internals.disable_attention_dropout(module) for module in llama.modules()]
    assert sorted(set(removed)) == [0.0, 0.25]
    assert torch.equal(llama(ids).logits, llama(ids).logits)


def test_a_dropout_module_of_that_name_is_left_alone() -> None:
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=8))
    assert not any(library_internals.disable_attention_dropout(module) for module in bloom.modules())


def test_quantized_weights_keep_their_shape() -> None:
    weight = nn.Module()
    weight.packed = Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    state = library_internals.quant_state(weight.packed)
    assert state is not None and tuple(state.shape) == (64, 64) and weight.packed.numel() == 64 * 64 // 2
    assert library_internals.quant_state(torch.zeros(2)) is None


def test_other_parameters_are_whole() -> None:
    plain = nn.Parameter(torch.zeros(2, 3))
    assert not library_internals.is_zero3_param(plain)
    assert library_internals.zero3_full_shape(plain) == (2, 3)


def dynamic_rope_model() -> LlamaForCausalLM:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=rope)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_dynamic_rope_depends_on_longer_rows_until_its_frequencies_are_restored() -> None:
    model, ids = dynamic_rope_model(), torch.arange(32)[None] % 8
    alone = model(ids[:, :16]).logits
    model(ids)
    assert not torch.equal(model(ids[:, :16]).logits, alone)
    rotary = [module for module in model.modules() if library_internals.recomputes_frequencies(module)]
    assert len(rotary) == 1
    library_internals.restore_frequencies(rotary[0])
    assert torch.equal(model(ids[:, :16]).logits, alone)


@torch.no_grad()
def test_a_4bit_layer_is_repacked_unless_the_flag_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def repack(*args: object) -> None:
        raise RuntimeError("repacked")

    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", repack)
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu").eval()
    with pytest.raises(RuntimeError, match="repacked"):
        layer(torch.zeros(1, 64))
    library_internals.disable_4bit_repacking(layer)
    assert layer(torch.zeros(1, 64)).shape == (1, 64)


@pytest.mark.parametrize("name", ["nf4", "int8", "none"])
def test_attributes_of_quantized_models_choose_the_adapter_layers(
    tmp_path: Path, llama: LlamaForCausalLM, name: str
) -> None:
    llama.save_pretrained(tmp_path)
    options = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=options[name], device_map={"": "cpu"}
    )
    assert library_internals.base_quantization(model) == name
    flags = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
    if name == "none":
        assert not any(hasattr(model, flag) for flag in flags.values())
        return
    expected = {*library_internals.QUANTIZATION_ATTRIBUTES} - {*flags.values()} | {flags[name]}
    assert all(hasattr(model, attribute) for attribute in expected)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    assert quantized_lora_layers(model, lora) == 1
    # As on the model that `align/reward/shared_base.py` builds, before it copies the attributes.
    for attribute in expected:
        delattr(model, attribute)
    assert quantized_lora_layers(model, lora) == 0


def quantized_lora_layers(model: PreTrainedModel, lora: LoraConfig) -> int:
    adapted = get_peft_model(model, lora)
    layers = [type(module).__name__ for module in adapted.modules() if isinstance(module, LoraLayer)]
    adapted.unload()
    return layers.count("Linear4bit") + layers.count("Linear8bitLt")


def test_a_second_training_selects_its_own_deepspeed_plugin(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    first, second = (DeepSpeedPlugin(zero_stage=stage) for stage in (1, 2))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.deepspeed_plugin is None
    arguments.deepspeed_plugin = second
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        state = Accelerator(cpu=True).state
        PartialState().distributed_type = DistributedType.DEEPSPEED
        state.deepspeed_plugins = {"default": first}
        state.select_deepspeed_plugin("default")
        library_internals.replace_deepspeed_plugin(arguments)
        assert AcceleratorState().deepspeed_plugin is second and arguments.deepspeed_plugin is None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


ZERO3 = """
import os
import torch
import deepspeed
from finetune import library_internals as internals

deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=config):
    weight = torch.nn.Linear(3, 2, bias=False).weight
assert weight.numel() == 0 and internals.is_zero3_param(weight)
assert internals.zero3_full_shape(weight) == (2, 3)
assert internals.zero3_shard(weight).numel() == 6
print("ok")
"""


def test_zero3_partitions_a_parameter() -> None:
    pytest.importorskip("deepspeed")
    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | one_process | {"MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", ZERO3]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().endswith("ok"), result.stderr
