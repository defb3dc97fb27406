"""The loss: predicting positions by hand, and equality with the reference for models, adapters, collators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from small_models import MODELS, VOCABULARY, assert_close, gradients, make, reference_loss_sum, token_rows
from torch import nn

from finetune.data.collate import Collator, PackedCollator, PaddedCollator
from finetune.lm_head import logits_at
from finetune.training.loss import (
    completion_loss_sum,
    cross_entropy_sum,
    held_out_loss,
    loss_positions,
    output_head,
)

COLLATORS: dict[str, Collator] = {
    "padded": PaddedCollator(0),
    "packed": PackedCollator(0),
    "one packed line": PackedCollator(0, single_row=True),
}
PREFIXED = ("prefix", "prompt")
WITH_SDPA = [name for name in MODELS if name != "gemma2"]  # soft-capped attention: only eager supports it


def adapted(name: str, method: str, attention: str = "sdpa") -> nn.Module:
    model = make(name, attention)
    if method == "full":
        return model
    configs = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    return get_peft_model(model, configs[method]).eval()


def ours(model: nn.Module, collator: Collator, lengths: list[int]) -> torch.Tensor:
    rows = token_rows(lengths)
    batch = collator([rows[index] for index in range(len(rows))])
    return completion_loss_sum(model, output_head(model), batch)


def check_against_reference(
    model: nn.Module, collator: Collator, lengths: list[int], tolerance: float = 1e-5
) -> None:
    loss = ours(model, collator, lengths)
    expected = reference_loss_sum(model, token_rows(lengths))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model, loss), gradients(model, expected), tolerance)


def test_loss_positions_by_hand() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    mask, targets = loss_positions(labels)
    # The state at t predicts the token at t + 1: 7 is at position 2, so position 1 predicts it.
    assert mask.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert targets.tolist() == [7, 8, 5]


def test_the_first_token_of_a_row_is_no_target() -> None:
    mask, targets = loss_positions(torch.tensor([[3, -100, -100]]))
    assert not mask.any() and targets.tolist() == []


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    # -ln(1/2) - ln(3/4)
    assert float(cross_entropy_sum(logits, torch.tensor([1, 0]))) == pytest.approx(
        math.log(2) + math.log(4 / 3)
    )


@pytest.mark.parametrize("max_elements", [1, VOCABULARY, 3 * VOCABULARY, 7 * VOCABULARY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_is_the_unchunked_one(max_elements: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = torch.randn(11, VOCABULARY).to(dtype)
    targets = torch.randint(VOCABULARY, (11,))
    full_logits, chunked_logits = (values.clone().requires_grad_() for _ in range(2))
    expected = cross_entropy_sum(full_logits, targets)
    actual = cross_entropy_sum(chunked_logits, targets, max_logits=max_elements)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    actual.backward()
    assert (
        full_logits.grad is not None and chunked_logits.grad is not None and full_logits.grad.abs().max() > 0
    )
    assert torch.equal(chunked_logits.grad, full_logits.grad)


@pytest.mark.parametrize("collation", COLLATORS)
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "eager") for name in MODELS), *((name, "sdpa") for name in WITH_SDPA)]
)
def test_pain_13_packed_equals_unpacked(name: str, attention: str, collation: str) -> None:
    check_against_reference(adapted(name, "full", attention), COLLATORS[collation], [9, 3, 14, 2, 6])


@pytest.mark.parametrize("method", ["lora", *PREFIXED])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_give_the_reference_loss(name: str, method: str) -> None:
    check_against_reference(adapted(name, method), COLLATORS["padded"], [9, 3, 14, 2, 6])


@pytest.mark.parametrize("collation", ["packed", "one packed line"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_under_lora(attention: str, collation: str) -> None:
    check_against_reference(adapted("qwen3", "lora", attention), COLLATORS[collation], [9, 3, 14, 2, 6])


LLAMA = make("llama")


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=8), collation=st.sampled_from(sorted(COLLATORS))
)
def test_any_lengths_give_the_reference_loss(lengths: list[int], collation: str) -> None:
    with torch.no_grad():
        actual = ours(LLAMA, COLLATORS[collation], lengths)
        expected = reference_loss_sum(LLAMA, token_rows(lengths))
    assert float(actual) == pytest.approx(float(expected), rel=2e-6)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=9), batch_size=st.integers(1, 5))
def test_held_out_loss_does_not_depend_on_the_batches(lengths: list[int], batch_size: int) -> None:
    rows = token_rows(lengths, seed=3)
    expected = float(reference_loss_sum(LLAMA, rows).detach()) / rows.num_trained
    for collator in COLLATORS.values():
        assert held_out_loss(LLAMA, rows, collator, batch_size=batch_size) == pytest.approx(
            expected, rel=2e-6
        )


@pytest.mark.parametrize("training", [True, False])
def test_held_out_loss_leaves_the_mode_as_it_was(training: bool) -> None:
    model = adapted("llama", "lora").train(training)
    held_out_loss(model, token_rows([5, 6]), PaddedCollator(0), batch_size=2)
    assert model.training is training


def test_the_head_gets_only_the_selected_positions() -> None:
    model = make("llama")
    head, seen = output_head(model), []
    head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    positions = torch.zeros(2, 6, dtype=torch.bool)
    positions[0, 1] = positions[1, 2] = positions[1, 5] = True
    logits_at(model, head, {"input_ids": torch.ones(2, 6, dtype=torch.long)}, positions)
    assert seen == [(1, 3, VOCABULARY)]


def test_the_hook_is_gone_after_an_error() -> None:
    model = make("llama")
    head = output_head(model)
    with pytest.raises(IndexError):
        logits_at(model, head, {"input_ids": torch.full((1, 4), VOCABULARY + 1)}, torch.ones(1, 4) > 0)
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCABULARY)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(AssertionError, match="LlamaModel has no output embeddings"):
        output_head(make("llama").model)
