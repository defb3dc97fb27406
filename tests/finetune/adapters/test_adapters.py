"""Adapters on tiny models of three families with random weights: trainable parameters and error messages."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from finetune.adapters import _targets
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.errors import UserError

HIDDEN, INNER, LAYERS, HEADS, WORDS = 32, 48, 2, 4, 64
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**SIZES),
}
KEY_WIDTH = {"llama": 2 * 8, "qwen3": 2 * 16, "gpt-neox": 4 * 8}
QUERY_WIDTH = {"llama": 4 * 8, "qwen3": 4 * 16}
FAMILIES = list(CONFIGS)
METHODS = plugin_names(ADAPTERS)


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family])


def build(family: str, method: str, **settings):
    module = load_plugin(ADAPTERS, method, where="test")
    return module.build(model_of(family), module.Settings(**settings))


def trained(model) -> dict[str, int]:
    return {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}


def linear_shapes(family: str) -> list[tuple[int, int]]:
    """Return (in, out) of each linear layer of one block."""
    if family == "gpt-neox":
        return [(HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)]
    query, key = QUERY_WIDTH[family], KEY_WIDTH[family]
    attention = [(HIDDEN, query), (HIDDEN, key), (HIDDEN, key), (query, HIDDEN)]
    return [*attention, (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_declares_itself(method):
    module = load_plugin(ADAPTERS, method, where="test")
    assert module.Settings().method == method
    assert module.TRAITS.quantization and set(module.TRAITS.quantization) <= {"none", "nf4", "int8"}
    assert 1e-5 <= module.TRAITS.learning_rate <= 1e-1
    assert module.Settings.model_config["frozen"] and module.Settings.model_config["extra"] == "forbid"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_lora_has_rank_times_in_plus_out_weights_on_each_linear_layer(family, method):
    """A is rank x in and B is out x rank, on every linear layer of every block, and nothing on the head."""
    expected = LAYERS * sum(4 * (inputs + outputs) for inputs, outputs in linear_shapes(family))
    names = trained(build(family, method, rank=4))
    assert sum(names.values()) == expected
    assert len(names) == 2 * LAYERS * len(linear_shapes(family))
    assert not [name for name in names if "lm_head" in name or "embed" in name]


def test_lora_on_chosen_layers():
    names = trained(build("llama", "lora", rank=2, target=["q_proj", "v_proj"]))
    query, value = HIDDEN + HIDDEN, HIDDEN + KEY_WIDTH["llama"]
    assert sum(names.values()) == LAYERS * 2 * (query + value)
    assert all(".q_proj." in name or ".v_proj." in name for name in names)


def test_lora_starts_at_the_base_and_counts_alpha_over_rank():
    ids = torch.tensor([[1, 2, 3]])
    adapted = build("llama", "lora", rank=4, alpha=6.0, dropout=0.0)
    assert torch.equal(adapted(ids).logits, model_of("llama")(ids).logits)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6.0 / 4
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.randn(1, 1, HIDDEN)
    product = 6.0 / 4 * layer.lora_B["default"](layer.lora_A["default"](x))
    assert torch.allclose(layer(x), layer.base_layer(x) + product, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_has_a_key_and_a_value_for_each_token_and_layer(family):
    names = trained(build(family, "prefix", virtual_tokens=5))
    assert list(names.values()) == [5 * LAYERS * 2 * KEY_WIDTH[family]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projected_prefix_is_made_by_an_mlp(family):
    """Embedding (tokens x width), then width -> width -> layers * 2 * width, both with a bias."""
    width = KEY_WIDTH[family]
    wide = LAYERS * 2 * width
    expected = 5 * width + (width * width + width) + (width * wide + wide)
    assert sum(trained(build(family, "prefix", virtual_tokens=5, projection=True)).values()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt_has_one_embedding_a_token(family):
    names = trained(build(family, "prompt", virtual_tokens=7))
    assert list(names.values()) == [7 * HIDDEN]


def test_a_soft_prompt_starts_from_real_words():
    adapted = build("llama", "prompt", virtual_tokens=7)
    embeddings = adapted.get_input_embeddings().weight
    (prompt,) = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert all(any(torch.equal(row, embedding) for embedding in embeddings) for row in prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_trains_all_and_adds_nothing(family):
    model = model_of(family)
    before = sum(weight.numel() for weight in model.parameters())
    model.requires_grad_(False)
    module = load_plugin(ADAPTERS, "full", where="test")
    assert module.build(model, module.Settings()) is model
    assert sum(trained(model).values()) == before


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen3", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("gpt-neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
def test_the_names_of_linear_layers(family, names):
    assert _targets.linear_module_names(model_of(family)) == names


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        (
            "gpt-neox",
            ["q_proj", "v_proj"],
            "adapter.target: no linear layer of GPTNeoXForCausalLM is named 'q_proj' or 'v_proj'\n"
            "    expected: all-linear, or a list of some of: query_key_value, dense, dense_h_to_4h, "
            "dense_4h_to_h",
        ),
        (
            "llama",
            ["q_proj", "gate_prj"],
            "adapter.target: no linear layer of LlamaForCausalLM is named 'gate_prj'\n"
            "    expected: all-linear, or a list of some of: q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj\n"
            "    repair:   did you mean 'gate_proj'?",
        ),
        (
            "llama",
            ["mlp"],
            "adapter.target: no linear layer of LlamaForCausalLM is named 'mlp'\n"
            "    expected: all-linear, or a list of some of: q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj",
        ),
    ],
)
def test_an_unknown_target_lists_the_layers_that_exist(family, target, message):
    with pytest.raises(UserError) as caught:
        build(family, "lora", target=target)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "target", ["self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head", "embed_tokens"]
)
def test_longer_names_the_head_and_embeddings_are_targets_too(target):
    names = trained(build("llama", "lora", target=[target])).keys()
    assert names and [name for name in names if f"{target}.lora_" not in name] == []
