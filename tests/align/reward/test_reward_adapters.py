"""Every adapter under a scoring head: the layouts agree, the library agrees, and what is saved scores."""

from pathlib import Path

import pytest
import torch
from adapter_properties import FAMILIES, METHODS
from group_models import SOME, random_groups
from peft import PeftModel
from reward_models import HEADS, adapted, folder_of, scorer, train, transformers_scores
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from align.preference.groups import GroupCollator
from align.reward.model import completion_scores
from finetune.adapters._load import load_saved_adapter
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = ("multitask_prompt",)
"""PEFT asks these for the task of each row, so that they open with ours alone."""


def trained(method: str, family: str) -> PeftModel:
    if reason := adapter_traits(method).scoring_unsupported:
        pytest.skip(reason)
    try:
        model = adapted(method, family)
    except UserError as error:
        pytest.skip(error.problems[0].actual)
    train(model, GroupCollator(0)(random_groups(SOME)))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_scores_equally_in_every_layout_and_after_saving(
    method: str, family: str, tmp_path: Path
) -> None:
    model, groups = trained(method, family), random_groups(SOME)
    expected = transformers_scores(model, groups)
    assert expected.shape == (7, 2) and expected.std() > 0.3
    with torch.no_grad():
        for collate in (GroupCollator(0), GroupCollator(0, budget=99), GroupCollator(0, one_per_row=True)):
            assert (completion_scores(model, collate(groups)) - expected).abs().max() < 2e-5
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert [name for name in load_file(tmp_path / "adapter_model.safetensors") if "score" in name]
    if method in ("qlora", "loftq"):
        base = scorer(family, "nf4")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder_of(family), num_labels=len(HEADS))
    opened = (
        load_saved_adapter(base, tmp_path) if method in OURS else PeftModel.from_pretrained(base, tmp_path)
    )
    opened.eval()
    assert torch.allclose(transformers_scores(opened, groups), expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_head_and_the_adapter_are_trained(method: str) -> None:
    if adapter_traits(method).scoring_unsupported or method == "bitfit":
        pytest.skip("it trains no head, or this base has no biases")
    model = adapted(method, "llama")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train(model, GroupCollator(0)(random_groups(SOME)), steps=5)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("score.modules_to_save" in name for name in moved)


def test_adapters_without_scoring_support_give_a_reason() -> None:
    without = {
        name: adapter_traits(name).scoring_unsupported
        for name in METHODS
        if adapter_traits(name).scoring_unsupported
    }
    assert set(without) == {"llama_adapter", "trainable_tokens"}
    assert all("PEFT cannot save a trained score head" in reason for reason in without.values())
