"""Phases of a run, byte counts derived by hand, and sharding."""

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.optimization import Adafactor

from finetune.planner import decoder
from finetune.planner.adapted_linears import AdaptedLinears
from finetune.planner.architecture import Architecture, LinearShape
from finetune.planner.attention import kv_cache_bytes
from finetune.planner.memory import CATEGORIES, Phase, peak_phase, plan_memory
from finetune.planner.parameter_count import count_trainable_parameters
from finetune.planner.static_memory import base_bytes, optimizer_bytes, quantized_bytes, static_memory
from finetune.planner.tape import Tape
from finetune.planner.train_step import simulate_forward, simulate_train_step
from finetune.planner.workload import Adapter, GenerationBatch, Workload
from finetune.recipe.base_config import StoredQuantization

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
LLAMA_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
LLAMA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}


VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False}


def workload(config: dict[str, Any] = SMALL, **sizes: Any) -> Workload:
    return Workload(Architecture.from_config(config), **{"rows": 4, "seq_len": 64, "predicted": 100, **sizes})


def phase(workload: Workload, name: str) -> Phase:
    return next(candidate for candidate in plan_memory(workload) if candidate.name == name)


@pytest.mark.parametrize("sizes", [(256, 512), (704, 256)])
def test_quantized_weight_bytes_match_bitsandbytes(sizes: tuple[int, int]) -> None:
    layer, plan = LinearShape("one", *sizes, False, 1), workload()
    real = Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    state = real.weight.quant_state
    tables = [state.code, state.absmax, state.offset, state.state2.absmax, state.state2.code]
    stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in [real.weight, *tables])
    assert quantized_bytes(layer, "nf4", plan) == stored_bytes
    int8_weight = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False).to("cpu").weight
    assert quantized_bytes(layer, "int8", plan) == int8_weight.numel() + int8_weight.SCB.numel() * 4


def test_stored_quantization_is_planned_as_stored() -> None:
    """Without double quantization, in float32, and with layers that the file leaves unquantized."""
    real = Linear4bit(256, 512, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    state, stored = real.weight.quant_state, StoredQuantization("bitsandbytes", "nf4", "nf4")
    plan = workload(quantization="nf4", stored=stored)
    tensors = [real.weight, state.code, state.absmax]
    stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert quantized_bytes(LinearShape("one", 256, 512, False, 1), "nf4", plan) == stored_bytes
    skipping = replace(stored, skip_modules=("lm_head", "model.layers.1", r"model\.layers\.[45]\.mlp"))
    layers = {layer.name: layer for layer in plan.architecture.linear_layers()}
    savings = {
        name: quantized_bytes(layer, "none", plan) - quantized_bytes(layer, "nf4", plan)
        for name, layer in layers.items()
    }
    mlp = savings["gate_proj"] + savings["up_proj"] + savings["down_proj"]
    expected = base_bytes(plan) + sum(savings.values()) + 2 * mlp
    assert base_bytes(replace(plan, stored=skipping)) == expected
    # A base that names no compute dtype multiplies in float32: two casts, and the weight twice.
    bfloat16 = replace(stored, compute_dtype="bfloat16")
    widths = [AdaptedLinears(Tape(), replace(plan, stored=which)) for which in (bfloat16, stored)]
    narrow, wide = (linears.dequantized_bytes(layers["up_proj"]) for linears in widths)
    numel = layers["up_proj"].in_features * layers["up_proj"].out_features
    assert (narrow, wide) == (2 * numel, (2 + 4) * numel)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (SMALL, "model.layers"),
        (SMALL | {"model_type": "gpt_neox"}, "gpt_neox.layers"),
        (
            {"model_type": "gemma3", "text_config": SMALL, "vision_config": VISION},
            "model.language_model.layers",
        ),
    ],
)
def test_module_names_are_those_of_transformers(config: dict[str, Any], prefix: str) -> None:
    architecture = Architecture.from_config(config)
    if "text_config" in config:
        config = {**config, "text_config": {**SMALL, "model_type": "gemma3_text"}}
    auto_class = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(AutoConfig.for_model(**config))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {name for layer in architecture.linear_layers() for name in architecture.module_names(layer)}
    assert names == linears - {"lm_head", "embed_out"}
    assert f"{prefix}.0" in {name.rsplit(".", 2)[0] for name in names}


def test_base_bytes() -> None:
    model = Architecture.from_config(LLAMA_7B)
    assert base_bytes(workload(LLAMA_7B)) == 2 * model.parameters
    assert base_bytes(workload(LLAMA_7B, adapter=Adapter("full"))) == 4 * model.parameters
    # The QLoRA paper, section 3: double quantization takes 0.127 bits per parameter, 4.127 in total.
    linear = sum(layer.weights for layer in model.linear_layers())
    nf4_bytes = base_bytes(workload(LLAMA_7B, quantization="nf4")) - 2 * (model.parameters - linear)
    assert nf4_bytes * 8 / linear == pytest.approx(4.127, abs=0.002)


def test_optimizer_state_bytes_match_real_optimizers() -> None:
    plan = workload(adapter=Adapter("lora", rank=4, dropout=False))
    trainable = count_trainable_parameters(plan.architecture, plan.adapter)
    assert optimizer_bytes(plan, trainable) == 8 * trainable
    plan_8bit = replace(plan, optimizer="adamw_8bit")
    assert optimizer_bytes(plan_8bit, 2560) == 2 * 2560 + 2 * 4 * 10
    weights = [
        nn.Parameter(torch.ones(size))
        for layer in plan.architecture.linear_layers()
        for _ in range(layer.count)
        for size in ((4, layer.in_features), (layer.out_features, 4))
    ]
    optimizer = Adafactor(weights, scale_parameter=False, relative_step=False, lr=1e-3)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    real = sum(value.numel() * 4 for value in states if isinstance(value, torch.Tensor) and value.dim())
    assert optimizer_bytes(replace(plan, optimizer="adafactor"), trainable) == real


def test_phases_of_each_objective() -> None:
    plain = ["load", "forward and backward", "optimizer step", "merge", "save"]
    assert [phase_of_run.name for phase_of_run in plan_memory(workload())] == plain
    assert "merge" not in [
        phase_of_run.name for phase_of_run in plan_memory(workload(adapter=Adapter("full")))
    ]
    generation = GenerationBatch(rows=8, prompt=32, completion=32)
    ppo = plan_memory(workload(objective="ppo", heads=1, rollout=generation, masked=True))
    assert [phase_of_run.name for phase_of_run in ppo] == ["load", "rollout", "score", *plain[1:]]
    assert all(tuple(phase_of_run.categories) == CATEGORIES for phase_of_run in ppo)
    peak_of_run = peak_phase(ppo)
    assert peak_of_run.total == max(sum(phase_of_run.categories.values()) for phase_of_run in ppo)
    assert all(size >= 0 for phase_of_run in ppo for size in phase_of_run.categories.values())


def test_kv_cache_bytes() -> None:
    """Llama-2-7B: 2 x 32 layers x 4096 x 2 bytes = 512 KiB per token."""
    plan = workload(LLAMA_7B, rollout=GenerationBatch(rows=16, prompt=512, completion=128))
    assert kv_cache_bytes(plan) == 16 * 640 * 512 * 1024
    assert phase(plan, "rollout").categories["key-value cache"] == kv_cache_bytes(plan)


@pytest.mark.parametrize("adapter", [Adapter(), Adapter("full"), Adapter("prefix", virtual_tokens=8)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_simulated_layers_equal_all_layers(
    adapter: Adapter, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [
        workload(adapter=adapter, checkpointing=checkpointing, precision=precision)
        for precision in ("bfloat16", "float32")
    ]
    short = [(simulate_train_step(plan), simulate_forward(plan)) for plan in plans]
    monkeypatch.setattr(decoder, "SIMULATED_LAYERS", 100)
    complete = [(simulate_train_step(plan), simulate_forward(plan)) for plan in plans]
    for simulated, full in zip(short, complete, strict=True):
        assert [tape.peak for tape in simulated] == [tape.peak for tape in full]
        assert simulated[0].peak_by_category == full[0].peak_by_category


def test_after_backward_only_gradients_remain() -> None:
    for objective in ("likelihood", "comparison", "scores", "ppo"):
        tape = simulate_train_step(workload(objective=objective, heads=1))
        assert tape.live_by_category["gradients"] == tape.param_grad_bytes
        assert tape.total - tape.param_grad_bytes <= 8  # the loss itself


def test_sharding_divides_weights_gradients_and_states() -> None:
    plan = workload(adapter=Adapter("full"), processes=4)
    single = static_memory(plan)
    for strategy, sharded in (
        ("ddp", ()),
        ("zero1", ("optimizer",)),
        ("zero2", ("optimizer", "gradients")),
        ("zero3", ("optimizer", "gradients", "base")),
        ("fsdp2", ("optimizer", "gradients", "base")),
    ):
        static = static_memory(replace(plan, strategy=strategy))
        for category in ("base", "gradients", "optimizer"):
            full_bytes = vars_of(single)[category]
            assert vars_of(static)[category] == (ceil(full_bytes / 4) if category in sharded else full_bytes)
    offloaded = static_memory(replace(plan, strategy="zero2", offload="cpu"))
    assert (offloaded.optimizer, offloaded.host) == (0, ceil(single.optimizer / 4))


def vars_of(static: Any) -> dict[str, int]:
    return {category: getattr(static, category) for category in ("base", "gradients", "optimizer")}


def test_memory_savings() -> None:
    plan = workload(LLAMA_7B, rows=4, seq_len=512, predicted=1000)
    baseline = peak_phase(plan_memory(plan)).total
    for change in ({"checkpointing": True}, {"quantization": "nf4"}, {"rows": 1}, {"seq_len": 256}):
        assert peak_phase(plan_memory(replace(plan, **change))).total < baseline
    for change in ({"masked": True}, {"attention": "eager"}, {"precision": "float32"}):
        assert peak_phase(plan_memory(replace(plan, **change))).total > baseline


def test_a_mask_is_saved_in_every_layer() -> None:
    """Boolean masks are converted to additive ones in every layer: 32 x 4 x 512 x 512 x 2 bytes = 64 MiB."""
    plan = workload(LLAMA_7B, rows=4, seq_len=512, predicted=1000)
    mask_bytes = simulate_train_step(replace(plan, masked=True)).peak - simulate_train_step(plan).peak
    query_grad_bytes = 4 * 4 * 512 * 4096  # a GPU sums the gradient of the queries in float32 without a mask
    assert 64 * 2**20 - query_grad_bytes <= mask_bytes <= 64 * 2**20


def test_logits_bytes() -> None:
    """In float32 the softmax, its gradient and that of the logits coexist: 12 bytes per logit."""
    plan = workload(precision="float32", predicted=1024, seq_len=256, adapter=Adapter("ia3"))
    plan = replace(plan, architecture=replace(plan.architecture, vocab_size=16_000))
    categories = phase(plan, "forward and backward").categories
    assert categories["logits and loss"] == pytest.approx(12 * 1024 * 16_000, rel=1e-3)
