"""Shared-prompt log-probabilities and gradients equal those of one forward pass per completion."""

import doctest

import pytest
import torch
from adapter_properties import FAMILIES, SIZES, WORDS
from group_models import (
    SHAPES,
    SOME,
    Shape,
    gradient_error,
    gradients,
    logp_error,
    plain_logps,
    random_groups,
    random_model,
    tiny,
    weighted_sum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel

from align.preference import logps as own
from align.preference.attention import block_attention
from align.preference.groups import Group, GroupCollator
from align.preference.logps import LayoutErrors, gather_logps, shared_layout_errors, token_logps
from finetune.data.collate import IGNORE_INDEX, LMExample, PackedCollator
from finetune.training.loss import completion_loss_sum, output_head

ATTENTION = ("sdpa", "eager")


def shared_logps(model: nn.Module, groups: list[Group], collate: GroupCollator, **options: int) -> Tensor:
    return token_logps(model, output_head(model), collate(groups), **options).sum(1)


def test_doctests() -> None:
    assert doctest.testmod(own) == (0, 3)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
@given(
    shapes=SHAPES, budget=st.integers(0, 90), seed=st.integers(0, 99), chunk=st.sampled_from([1, 7, 10**6])
)
@settings(deadline=None, max_examples=12)
def test_shared_prompts_match_separate_passes(
    family: str, attention: str, shapes: list[Shape], budget: int, seed: int, chunk: int
) -> None:
    model, groups = tiny(family, attention), random_groups(shapes, seed)
    logps = shared_logps(model, groups, GroupCollator(0, budget), max_elements=chunk * WORDS)
    expected = plain_logps(model, groups)
    assert logp_error(logps, expected) < 1e-5
    assert (
        gradient_error(gradients(model, weighted_sum(logps)), gradients(model, weighted_sum(expected))) < 1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
@given(shapes=SHAPES)
@settings(deadline=None, max_examples=8)
def test_one_per_row_matches_separate_passes(family: str, shapes: list[Shape]) -> None:
    model, groups = tiny(family), random_groups(shapes)
    logps, expected = (
        shared_logps(model, groups, GroupCollator(0, one_per_row=True)),
        plain_logps(model, groups),
    )
    assert logp_error(logps, expected) < 1e-5
    assert (
        gradient_error(gradients(model, weighted_sum(logps)), gradients(model, weighted_sum(expected))) < 1e-4
    )


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_with_gradient_checkpointing(attention: str) -> None:
    model, groups = tiny("llama", attention), random_groups(SOME)
    expected = gradients(model, weighted_sum(plain_logps(model, groups)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # without dropout the mode changes nothing else
    loss = weighted_sum(shared_logps(model, groups, GroupCollator(0)))
    assert gradient_error(gradients(model, loss), expected) < 1e-4


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_completions_do_not_attend_to_each_other(family: str, attention: str) -> None:
    model, (group,) = tiny(family, attention), random_groups([(6, [4, 5, 3])])
    before = shared_logps(model, [group], GroupCollator(0))
    for changed in range(3):
        completions = list(group.completions)
        completions[changed] = completions[changed].flip(0) % (WORDS - 1) + 1
        after = shared_logps(model, [Group(group.prompt, tuple(completions))], GroupCollator(0))
        same = torch.arange(3) != changed
        assert torch.equal(after[same], before[same])
        assert abs(float(after[changed] - before[changed])) > 0.1


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_groups_of_a_row_do_not_attend_to_each_other(attention: str) -> None:
    model, (first, second) = tiny("llama", attention), random_groups([(6, [4, 5]), (3, [2, 6])])
    other = Group(first.prompt.flip(0), first.completions)
    collate = GroupCollator(0, budget=99)
    before, after = (
        shared_logps(model, [first, second], collate),
        shared_logps(model, [other, second], collate),
    )
    assert torch.equal(after[2:], before[2:])
    assert not torch.isclose(after[:2], before[:2]).any()


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_padding_ids_change_nothing(attention: str) -> None:
    model, groups = tiny("qwen2", attention), random_groups([(6, [4, 5]), (3, [2, 2])])
    first, second = (shared_logps(model, groups, GroupCollator(pad_id)) for pad_id in (0, 50))
    assert torch.equal(first, second)
    batch = GroupCollator(0)(groups)
    assert int((batch["group_ids"] == 0).sum()) > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_one_completion_matches_the_sft_loss(family: str) -> None:
    model, groups = tiny(family), random_groups([(5, [3]), (2, [6]), (8, [1])])
    logps = shared_logps(model, groups, GroupCollator(0, budget=20))
    rows = []
    for number, group in enumerate(groups):
        ids = torch.cat([group.prompt, *group.completions])
        labels = ids.clone()
        labels[: len(group.prompt)] = IGNORE_INDEX
        rows.append(LMExample(input_ids=ids, labels=labels, row=number))
    expected = completion_loss_sum(model, output_head(model), PackedCollator(0)(rows))  # type: ignore[arg-type]
    assert -float(logps.sum().detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert gradient_error(gradients(model, -logps.sum()), gradients(model, expected)) < 1e-4


@torch.no_grad()
def test_token_logps_are_0_after_a_completion() -> None:
    model, groups = tiny("llama"), random_groups(SOME)
    batch = GroupCollator(0)(groups)
    logps_CT = token_logps(model, output_head(model), batch)
    assert logps_CT.shape == (7, 6) and bool((logps_CT <= 0).all())
    assert torch.equal((logps_CT != 0).sum(1), batch["lengths"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_neither_values_nor_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, WORDS, dtype=dtype).requires_grad_()
    state_index, targets = torch.tensor([0, 0, 0, 1, 3, 4, 4, 8]), torch.randint(WORDS, (8,))
    expected = logits.float().log_softmax(-1)[state_index, targets]
    (expected_grad,) = torch.autograd.grad(expected.pow(2).sum(), logits)
    for rows in (1, 2, 4, 9):
        logps = gather_logps(logits, state_index, targets, max_elements=rows * WORDS)
        (gradient,) = torch.autograd.grad(logps.pow(2).sum(), logits)
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected_grad)


def test_block_mask_in_bfloat16() -> None:
    for attention in ATTENTION:
        model, groups = tiny("llama", attention).to(torch.bfloat16), random_groups(SOME)
        logps = shared_logps(model, groups, GroupCollator(0)).detach()
        with torch.no_grad():
            expected = plain_logps(model, groups)
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps, expected, rtol=0.05, atol=0.5)


def test_unused_block_mask_is_an_error() -> None:
    model, batch = tiny("llama"), GroupCollator(0)(random_groups(SOME))
    with pytest.raises(AssertionError, match="the block mask was not used"), block_attention(model, batch):
        pass
    assert not model.base_model._forward_pre_hooks


def layout_errors(model: PreTrainedModel) -> LayoutErrors:
    return shared_layout_errors(
        model, output_head(model), random_groups(SOME), pad_id=0, epsilon=torch.finfo(model.dtype).eps
    )


def test_layout_errors_detect_a_sliding_window() -> None:
    model = tiny("llama").train()
    errors = layout_errors(model)
    assert errors.difference < 1e-5 and model.training
    assert errors.leak == 0
    # A window of 6 tokens is shorter than the groups' texts, and the block mask does not know it.
    sliding = random_model(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6))
    assert layout_errors(sliding).difference > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_of_one_percent_between_completions_is_found(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    healthy = layout_errors(model)
    assert healthy.leak == 0 and healthy.difference <= 1e-3 + healthy.rounding
    # The embedding of the previous token, which may be another completion's.
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + 0.01 * torch.roll(output, 1, dims=1)
    )
    leaking = layout_errors(model)
    assert leaking.leak > leaking.allowed_leak
