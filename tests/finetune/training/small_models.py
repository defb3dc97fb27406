"""Random models of a few thousand weights, rows of random tokens, and the reference loss."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetune.data.dataset import TokenizedRows

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **GROUPED))


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def gemma2() -> PreTrainedModel:
    capped = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 8}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **GROUPED, **capped))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gpt_neox": gpt_neox,
    "gemma2": gemma2,
}


def make(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """Return a random model with logits large enough for soft-capping to act."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.set_attn_implementation("eager" if name == "gemma2" else attention)
    return model.eval()


def token_rows(lengths: Sequence[int], *, seed: int = 0, trained: float = 0.5) -> TokenizedRows:
    """Return rows of random tokens; the first token of a row never carries loss, the last one always does."""
    random = np.random.default_rng(seed)
    total = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    learnt = random.random(total) < trained
    learnt[starts[1:] - 1] = True
    learnt[starts[:-1]] = False
    ids = random.integers(1, VOCABULARY, total, dtype=np.int32)
    arrays = {"input_ids": ids, "trained": learnt, "starts": starts}
    return TokenizedRows(arrays, [f"row {index}" for index in range(len(lengths))])


def plain_loss_sum(model: nn.Module, rows: TokenizedRows) -> torch.Tensor:
    """Return the reference loss sum: one row at a time, all logits, shifted by one."""
    total = torch.zeros(())
    for index in range(len(rows)):
        row = rows[index]
        logits = model(input_ids=row["input_ids"][None]).logits[0].float()
        logits = logits[-len(row["input_ids"]) :]  # after the virtual tokens
        total = total + F.cross_entropy(logits[:-1], row["labels"][1:], reduction="sum", ignore_index=-100)
    return total


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of every trained weight, and clear them."""
    model.zero_grad()
    loss.backward()
    found = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare gradients relative to the largest entry of each tensor's expected value."""
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3)
        difference = float((found[name] - value).abs().max()) / scale
        assert difference < tolerance, f"{name}: {difference:.1e}"
