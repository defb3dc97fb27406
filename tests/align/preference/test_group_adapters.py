"""Shared-prompt batches with every adapter (virtual tokens too) and through DDP."""

from collections.abc import Iterator

import pytest
import torch
from adapter_properties import FAMILIES, METHODS, base_of, build, first_choice, train
from group_models import (
    SOME,
    error,
    gradient_error,
    gradients,
    mixed,
    random_groups,
    separate_logps,
)
from peft import PeftModel
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from align.preference.groups import GroupCollator
from align.preference.logps import completion_logps
from finetune.recipe.errors import UserError
from finetune.training.head import output_head

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = {
    "padded": GroupCollator(0),
    "one line": GroupCollator(0, budget=99),
    "separate": GroupCollator(0, separate=True),
}
AS_INPUTS = ("prompt", "ptuning", "multitask_prompt", "progressive_prompt")
AS_KEYS = ("prefix", "ptuning_v2", "adaptive_prefix")
VIRTUAL = (*AS_INPUTS, *AS_KEYS)


def adapted(method: str, family: str, attention: str = "sdpa") -> PeftModel:
    """Return a base with a trained adapter, or skip with the adapter's reason."""
    base = base_of(family, first_choice(method))
    base.set_attn_implementation(attention)
    try:
        model = build(method, base)
    except UserError as error:
        pytest.skip(error.problems[0].found)
    train(model, steps=3)
    return model


def errors(model: PeftModel) -> dict[str, tuple[float, float]]:
    """Return the error of each layout against one pass per completion, in log-probabilities and gradients."""
    groups, found = random_groups(SOME), {}
    expected = separate_logps(model, groups)
    wanted = gradients(model, mixed(expected))
    for name, collate in LAYOUTS.items():
        logps = completion_logps(model, output_head(model), collate(groups))
        found[name] = error(logps, expected), gradient_error(gradients(model, mixed(logps)), wanted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_shared_is_separate_with_every_adapter(method: str, family: str) -> None:
    for layout, (value, gradient) in errors(adapted(method, family)).items():
        assert value < 1e-5 and gradient < 1e-4, layout


@pytest.mark.parametrize("method", [*VIRTUAL, "lora", "llama_adapter"])
def test_shared_is_separate_in_eager_attention(method: str) -> None:
    for layout, (value, gradient) in errors(adapted(method, "llama", "eager")).items():
        assert value < 1e-5 and gradient < 1e-4, layout


@pytest.mark.parametrize("method", [*VIRTUAL, "lora"])
def test_an_adapter_switched_off_leaves_the_base(method: str) -> None:
    model, groups = adapted(method, "llama"), random_groups(SOME)
    batch = GroupCollator(0)(groups)
    with torch.no_grad():
        expected = separate_logps(base_of("llama"), groups)
        assert not torch.allclose(completion_logps(model, output_head(model), batch), expected, atol=1e-3)
        with model.disable_adapter():
            found = completion_logps(model, output_head(model), batch)
    assert error(found, expected) < 1e-5


@pytest.fixture
def _one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_the_mask_goes_through_ddp(method: str) -> None:
    model, groups = adapted(method, "llama"), random_groups(SOME)
    expected = separate_logps(model, groups)
    wanted = gradients(model, mixed(expected))
    wrapped = DistributedDataParallel(model)
    found = completion_logps(wrapped, output_head(model), GroupCollator(0)(groups))
    assert error(found, expected) < 1e-5
    assert gradient_error(gradients(model, mixed(found)), wanted) < 1e-4
