"""The private attributes of libraries that the project reads: an upgrade that changes one fails here."""

import pytest
import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MambaForCausalLM

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


def test_deepspeed_sets_the_attributes_of_partitioned_parameters() -> None:
    partition_parameters = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")
    source = partition_parameters.__loader__.get_source(partition_parameters.__name__)
    for attribute in ("ds_id", "ds_shape", "ds_tensor"):
        assert f"param.{attribute} = " in source, attribute
    plain = nn.Parameter(torch.zeros(2, 3))
    assert not library_internals.is_zero3_param(plain)
    assert library_internals.zero3_full_shape(plain) == (2, 3)
