"""Several models on one base: no second copy of its weights, and none of them feels another's adapter."""

from pathlib import Path

import pytest
import torch
from adapter_properties import FAMILIES, base_of, build, logits, train
from reward_models import adapted, tokenized
from reward_models import train as train_scores
from torch import Tensor, nn

from align.reward.collate import RewardCollator
from align.reward.model import completion_scores, score_head
from align.reward.shared_base import own_weights, scorer_on
from finetune.adapters._load import open_adapter
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
    alone = adapted(method, family)
    train_scores(alone, BATCH)
    alone.save_pretrained(str(tmp_path))
    causal = base_of(family, stored)
    known = {weight.data_ptr() for weight in causal.parameters()}
    shared = open_adapter(scorer_on(causal, ["help", "safety"], pad_id=0), tmp_path)
    assert torch.equal(scores(shared), scores(alone))
    own = [name for name, weight in shared.named_parameters() if weight.data_ptr() not in known]
    assert all(any(part in name for part in OWN) for name in own), own
    policy = build(method, causal)
    train(policy)
    assert torch.equal(scores(shared), scores(alone)), "the policy's adapter is felt by the reward model"


@pytest.mark.parametrize("method", ["full", "layernorm", "bitfit"])
def test_a_policy_that_trains_the_bases_weights_leaves_the_others_alone(method: str) -> None:
    causal = base_of("gpt-neox")
    scorer = scorer_on(causal, ["reward"], pad_id=0)
    torch.manual_seed(5)
    nn.init.normal_(score_head(scorer).weight)
    before = scores(scorer)
    plugin = load_plugin(ADAPTERS, method, where="test")
    policy = plugin.build(causal, plugin.Settings())
    own_weights(scorer, [policy])
    start = logits(policy).clone()
    train(policy)
    assert not torch.equal(logits(policy), start)
    assert torch.equal(scores(scorer), before)
    assert not any(weight.requires_grad for weight in scorer.parameters())
