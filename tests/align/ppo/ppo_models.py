"""A small policy, value and reward model on one base, and made-up completions."""

from collections.abc import Sequence

import numpy as np
import torch
from adapter_properties import base_of, build, default_quantization
from peft import PeftModel
from reward_models import tokenized
from reward_models import train as train_scores
from torch import nn

from align.ppo.actor_critic import ActorCritic
from align.ppo.experience import Rollout, RolloutTensors
from align.reward.batch import RewardCollator
from align.reward.model import find_score_head
from align.reward.shared_base import scorer_sharing_base, untie_trained_weights
from align.rl.completions import ScoredCompletions
from align.rl.prompts import Prompt
from align.rl.rewards.rewards import RewardScores
from align.rl.token_stats import token_mask
from finetune.generation.sampler import SampledCompletion

BATCH = RewardCollator(pad_id=0)(tokenized([[0, 1], [0, 1]]))
LENGTHS = [(5, 3), (3, 6), (7, 1), (4, 4)]
"""Tokens of each prompt and of its completion."""


def build_models(method: str, family: str, *, temperature: float = 1.0) -> tuple[ActorCritic, PeftModel]:
    """Return policy and value model, and a trained reward model, on one base."""
    base = base_of(family, default_quantization(method))
    scorers = [scorer_sharing_base(base, ["reward"], pad_id=0) for _ in range(2)]
    for seed, scorer in enumerate(scorers):
        torch.manual_seed(seed)
        nn.init.normal_(find_score_head(scorer).weight, std=0.1)
    value, reward = (build("lora", scorer) for scorer in scorers)
    train_scores(reward, BATCH)
    reward.requires_grad_(False)
    reward.zero_grad(set_to_none=True)
    policy = build(method, base)
    for other in (value, reward):
        untie_trained_weights(other, [policy])
    return ActorCritic(policy, value, head_index=0, temperature=temperature), reward


def random_ids(seed: int = 0) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return prompts and completions of random tokens."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(1, 90, length).tolist()) for length, _ in LENGTHS]
    return prompts, [tuple(rng.integers(1, 90, length).tolist()) for _, length in LENGTHS]


def random_rollout(actor_critic: ActorCritic, seed: int = 0) -> Rollout:
    """Return a rollout of random values, 0 after the end of each completion."""
    prompts, completions = random_ids(seed)
    max_length = max(map(len, completions))
    mask = token_mask(torch.tensor([len(completion) for completion in completions]), max_length)
    torch.manual_seed(seed)
    tensors = [torch.randn(len(prompts), max_length) * mask for _ in range(5)]
    return Rollout(tuple(range(len(prompts))), tuple(prompts), tuple(completions), RolloutTensors(*tensors))


def scored_completions(rewards: Sequence[float], stopped: Sequence[bool] | None = None) -> ScoredCompletions:
    """Return completions with these rewards."""
    prompts, completions = random_ids()
    ended_with_eos = stopped or [True] * len(prompts)
    return ScoredCompletions(
        [Prompt((), token_ids, f"rows:{index}", None) for index, token_ids in enumerate(prompts)],
        [
            SampledCompletion(token_ids, ended)
            for token_ids, ended in zip(completions, ended_with_eos, strict=True)
        ],
        [f"text {index}" for index in range(len(prompts))],
        RewardScores(np.asarray(rewards), {"reward": np.asarray(rewards)}),
    )
