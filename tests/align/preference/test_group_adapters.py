"""Shared-prompt batches with every adapter (virtual tokens too) and through DDP."""

from collections.abc import Iterator

import pytest
import torch
from adapter_properties import FAMILIES, METHODS, base_of, build, default_quantization, train
from group_models import (
    SOME,
    gradient_error,
    gradients,
    logp_error,
    plain_logps,
    random_groups,
    weighted_sum,
)
from peft import PeftModel
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from align.preference.groups import GroupCollator
from align.preference.logps import token_logps
from finetune.recipe.errors import UserError
from finetune.training.loss import output_head

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = {
    "padded": GroupCollator(0),
    "one line": GroupCollator(0, budget=99),
    "separate": GroupCollator(0, one_per_row=True),
}
AS_INPUTS = ("prompt", "ptuning", "multitask_prompt", "progressive_prompt")
AS_KEYS = ("prefix", "ptuning_v2", "adaptive_prefix")
VIRTUAL = (*AS_INPUTS, *AS_KEYS)


def adapted(method: str, family: str, attention: str = "sdpa") -> PeftModel:
    """Return a base with a trained adapter, or skip with the adapter's reason."""
    base = base_of(family, default_quantization(method))
    base.set_attn_implementation(attention)
    try:
        model = build(method, base)
    except UserError as error:
        pytest.skip(error.problems[0].actual)
    train(model, steps=3)
    return model


def layout_errors(model: PeftModel) -> dict[str, tuple[float, float]]:
    """Return the error of each layout against one pass per completion, in log-probabilities and gradients."""
    groups, error_by_layout = random_groups(SOME), {}
    expected = plain_logps(model, groups)
    expected_grads = gradients(model, weighted_sum(expected))
    for name, collate in LAYOUTS.items():
        logps = token_logps(model, output_head(model), collate(groups)).sum(1)
        error_by_layout[name] = (
            logp_error(logps, expected),
            gradient_error(gradients(model, weighted_sum(logps)), expected_grads),
        )
    return error_by_layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_shared_prompts_match_with_every_adapter(method: str, family: str) -> None:
    for layout, (value, gradient) in layout_errors(adapted(method, family)).items():
        assert value < 1e-5 and gradient < 1e-4, layout


@pytest.mark.parametrize("method", [*VIRTUAL, "lora", "llama_adapter"])
def test_shared_prompts_match_in_eager_attention(method: str) -> None:
    for layout, (value, gradient) in layout_errors(adapted(method, "llama", "eager")).items():
        assert value < 1e-5 and gradient < 1e-4, layout


@pytest.mark.parametrize("method", [*VIRTUAL, "lora"])
def test_disabled_adapter_gives_the_base(method: str) -> None:
    model, groups = adapted(method, "llama"), random_groups(SOME)
    batch = GroupCollator(0)(groups)
    with torch.no_grad():
        expected = plain_logps(base_of("llama"), groups)
        assert not torch.allclose(token_logps(model, output_head(model), batch).sum(1), expected, atol=1e-3)
        with model.disable_adapter():
            logps = token_logps(model, output_head(model), batch).sum(1)
    assert logp_error(logps, expected) < 1e-5


@pytest.fixture
def _one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_block_mask_works_through_ddp(method: str) -> None:
    model, groups = adapted(method, "llama"), random_groups(SOME)
    expected = plain_logps(model, groups)
    expected_grads = gradients(model, weighted_sum(expected))
    wrapped = DistributedDataParallel(model)
    logps = token_logps(wrapped, output_head(model), GroupCollator(0)(groups)).sum(1)
    assert logp_error(logps, expected) < 1e-5
    assert gradient_error(gradients(model, weighted_sum(logps)), expected_grads) < 1e-4
