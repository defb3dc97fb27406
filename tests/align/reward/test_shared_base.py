"""Several models on one base: no second copy of its weights, and none of them feels another's adapter."""

from pathlib import Path

import pytest
import torch
from adapter_properties import FAMILIES, base_of, build, logits, train
from reward_models import adapted, tokenized
from reward_models import train as train_scores
from torch import Tensor, nn

from align.reward.batch import RewardCollator
from align.reward.model import completion_scores, find_score_head
from align.reward.shared_base import scorer_sharing_base, untie_trained_weights
from finetune.adapters._load import load_saved_adapter
from finetune.recipe.discovery import ADAPTERS, load_plugin

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = ("lora_", "ia3_", "prompt_encoder", "score")
"""Parts of the names of weights that a reward model does not share."""
BATCH = RewardCollator(pad_id=0)(tokenized([[0, 1], [0, 1, 2]]))


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    return completion_scores(model.eval(), BATCH)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "qlora", "prefix", "ia3"])
def test_pain_08_a_reward_model_scores_the_same_on_a_shared_base(
    method: str, family: str, tmp_path: Path
) -> None:
    stored = "nf4" if method == "qlora" else "none"
    separate = adapted(method, family)
    train_scores(separate, BATCH)
    separate.save_pretrained(str(tmp_path))
    causal = base_of(family, stored)
    shared_pointers = {weight.data_ptr() for weight in causal.parameters()}
    shared = load_saved_adapter(scorer_sharing_base(causal, ["help", "safety"], pad_id=0), tmp_path)
    assert torch.equal(scores(shared), scores(separate))
    unshared_names = [
        name for name, weight in shared.named_parameters() if weight.data_ptr() not in shared_pointers
    ]
    assert all(any(fragment in name for fragment in OWN) for name in unshared_names), unshared_names
    policy = build(method, causal)
    train(policy)
    assert torch.equal(scores(shared), scores(separate)), "the policy's adapter is felt by the reward model"


@pytest.mark.parametrize("method", ["full", "layernorm", "bitfit"])
def test_training_base_weights_does_not_change_other_models(method: str) -> None:
    causal = base_of("gpt-neox")
    scorer = scorer_sharing_base(causal, ["reward"], pad_id=0)
    torch.manual_seed(5)
    nn.init.normal_(find_score_head(scorer).weight)
    before = scores(scorer)
    plugin = load_plugin(ADAPTERS, method, where="test")
    policy = plugin.build(causal, plugin.Settings())
    untie_trained_weights(scorer, [policy])
    start = logits(policy).clone()
    train(policy)
    assert not torch.equal(logits(policy), start)
    assert torch.equal(scores(scorer), before)
    assert not any(weight.requires_grad for weight in scorer.parameters())
