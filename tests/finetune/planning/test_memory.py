"""Phases of a run, byte counts derived by hand, and sharding."""

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers.optimization import Adafactor

from finetune.planning import decoder
from finetune.planning.architecture import Architecture, Linear
from finetune.planning.caches import cache_bytes
from finetune.planning.memory import PARTS, Phase, peak, plan_memory
from finetune.planning.resident import base_bytes, optimizer_bytes, quantized_bytes, resident
from finetune.planning.step import played, read
from finetune.planning.trained import trained_parameters
from finetune.planning.workload import Adapter, Rollout, Workload

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
LLAMA_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
LLAMA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}


def work(config: dict[str, Any] = SMALL, **how: Any) -> Workload:
    return Workload(Architecture.of(config), **{"lines": 4, "columns": 64, "predicted": 100, **how})


def phase(workload: Workload, name: str) -> Phase:
    return next(one for one in plan_memory(workload) if one.name == name)


@pytest.mark.parametrize("sizes", [(256, 512), (704, 256)])
def test_bytes_of_a_quantized_weight_are_those_of_a_real_one(sizes: tuple[int, int]) -> None:
    layer, plan = Linear("one", *sizes, False, 1), work()
    real = Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    state = real.weight.quant_state
    tables = [state.code, state.absmax, state.offset, state.state2.absmax, state.state2.code]
    stored = sum(one.numel() * one.element_size() for one in [real.weight, *tables])
    assert quantized_bytes(layer, "nf4", plan) == stored
    eight = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False).to("cpu").weight
    assert quantized_bytes(layer, "int8", plan) == eight.numel() + eight.SCB.numel() * 4


def test_a_base_in_memory() -> None:
    model = Architecture.of(LLAMA_7B)
    assert base_bytes(work(LLAMA_7B)) == 2 * model.parameters
    assert base_bytes(work(LLAMA_7B, adapter=Adapter("full"))) == 4 * model.parameters
    # The QLoRA paper, section 3: double quantization takes 0.127 bits per parameter, 4.127 in total.
    linear = sum(layer.weights for layer in model.linear_layers())
    four = base_bytes(work(LLAMA_7B, quantization="nf4")) - 2 * (model.parameters - linear)
    assert four * 8 / linear == pytest.approx(4.127, abs=0.002)


def test_states_of_an_optimizer_are_those_of_a_real_one() -> None:
    plan = work(adapter=Adapter("lora", rank=4, dropout=False))
    trained = trained_parameters(plan.architecture, plan.adapter)
    assert optimizer_bytes(plan, trained) == 8 * trained
    eight = replace(plan, optimizer="adamw_8bit")
    assert optimizer_bytes(eight, 2560) == 2 * 2560 + 2 * 4 * 10
    weights = [
        nn.Parameter(torch.ones(size))
        for layer in plan.architecture.linear_layers()
        for _ in range(layer.count)
        for size in ((4, layer.inputs), (layer.outputs, 4))
    ]
    optimizer = Adafactor(weights, scale_parameter=False, relative_step=False, lr=1e-3)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    real = sum(value.numel() * 4 for value in states if isinstance(value, torch.Tensor) and value.dim())
    assert optimizer_bytes(replace(plan, optimizer="adafactor"), trained) == real


def test_phases_of_each_objective() -> None:
    plain = ["load", "forward and backward", "optimizer step", "merge", "save"]
    assert [one.name for one in plan_memory(work())] == plain
    assert "merge" not in [one.name for one in plan_memory(work(adapter=Adapter("full")))]
    asked = Rollout(lines=8, prompt=32, completion=32)
    ppo = plan_memory(work(objective="ppo", heads=1, rollout=asked, masked=True))
    assert [one.name for one in ppo] == ["load", "rollout", "score", *plain[1:]]
    assert all(tuple(one.parts) == PARTS for one in ppo)
    fullest = peak(ppo)
    assert fullest.total == max(sum(one.parts.values()) for one in ppo)
    assert all(size >= 0 for one in ppo for size in one.parts.values())


def test_the_cache_of_a_rollout() -> None:
    """Llama-2-7B: 2 x 32 layers x 4096 x 2 bytes = 512 KiB per token."""
    plan = work(LLAMA_7B, rollout=Rollout(lines=16, prompt=512, completion=128))
    assert cache_bytes(plan) == 16 * 640 * 512 * 1024
    assert phase(plan, "rollout").parts["key-value cache"] == cache_bytes(plan)


@pytest.mark.parametrize("adapter", [Adapter(), Adapter("full"), Adapter("prefix", virtual_tokens=8)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_layers_stand_for_all(
    adapter: Adapter, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [
        work(adapter=adapter, checkpointing=checkpointing, precision=precision)
        for precision in ("bfloat16", "float32")
    ]
    short = [(played(plan), read(plan)) for plan in plans]
    monkeypatch.setattr(decoder, "PLAYED", 100)
    whole = [(played(plan), read(plan)) for plan in plans]
    for few, every in zip(short, whole, strict=True):
        assert [one.peak for one in few] == [one.peak for one in every]
        assert few[0].most == every[0].most


def test_after_a_pass_only_gradients_are_left() -> None:
    for objective in ("likelihood", "comparison", "scores", "ppo"):
        tape = played(work(objective=objective, heads=1))
        assert tape.live["gradients"] == tape.trained
        assert tape.total - tape.trained <= 8  # the loss itself


def test_what_partitioning_divides() -> None:
    plan = work(adapter=Adapter("full"), processes=4)
    single = resident(plan)
    for strategy, divided in (
        ("ddp", ()),
        ("zero1", ("optimizer",)),
        ("zero2", ("optimizer", "gradients")),
        ("zero3", ("optimizer", "gradients", "base")),
        ("fsdp2", ("optimizer", "gradients", "base")),
    ):
        held = resident(replace(plan, strategy=strategy))
        for part in ("base", "gradients", "optimizer"):
            whole = vars_of(single)[part]
            assert vars_of(held)[part] == (ceil(whole / 4) if part in divided else whole)
    away = resident(replace(plan, strategy="zero2", offload="cpu"))
    assert (away.optimizer, away.host) == (0, ceil(single.optimizer / 4))


def vars_of(held: Any) -> dict[str, int]:
    return {part: getattr(held, part) for part in ("base", "gradients", "optimizer")}


def test_what_saves_memory_saves_it() -> None:
    plan = work(LLAMA_7B, lines=4, columns=512, predicted=1000)
    whole = peak(plan_memory(plan)).total
    for change in ({"checkpointing": True}, {"quantization": "nf4"}, {"lines": 1}, {"columns": 256}):
        assert peak(plan_memory(replace(plan, **change))).total < whole
    for change in ({"masked": True}, {"attention": "eager"}, {"precision": "float32"}):
        assert peak(plan_memory(replace(plan, **change))).total > whole


def test_a_mask_is_kept_in_every_layer() -> None:
    """Boolean masks are converted to additive ones in every layer: 32 x 4 x 512 x 512 x 2 bytes = 64 MiB."""
    plan = work(LLAMA_7B, lines=4, columns=512, predicted=1000)
    more = played(replace(plan, masked=True)).peak - played(plan).peak
    queries = 4 * 4 * 512 * 4096  # a GPU sums the gradient of the queries in float32 without a mask
    assert 64 * 2**20 - queries <= more <= 64 * 2**20


def test_logits_of_one_pass() -> None:
    """In float32 the softmax, its gradient and that of the logits coexist: 12 bytes per logit."""
    plan = work(precision="float32", predicted=1024, columns=256, adapter=Adapter("ia3"))
    plan = replace(plan, architecture=replace(plan.architecture, vocabulary=16_000))
    parts = phase(plan, "forward and backward").parts
    assert parts["logits and loss"] == pytest.approx(12 * 1024 * 16_000, rel=1e-3)
