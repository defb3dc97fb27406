"""A small policy, value and reward model on one base, and made-up completions."""

from collections.abc import Sequence

import numpy as np
import torch
from adapter_properties import base_of, build, first_choice
from peft import PeftModel
from reward_models import tokenized
from reward_models import train as train_scores
from torch import nn

from align.ppo.episodes import Episodes, Tables
from align.ppo.roles import Roles
from align.reward.collate import RewardCollator
from align.reward.model import score_head
from align.reward.shared_base import own_weights, scorer_on
from align.rl.prompts import Prompt
from align.rl.reading import token_mask
from align.rl.replies import Replies
from align.rl.rewards.rewards import Judged
from align.rl.rollout import Completion

BATCH = RewardCollator(pad_id=0)(tokenized([[0, 1], [0, 1]]))
LENGTHS = [(5, 3), (3, 6), (7, 1), (4, 4)]
"""Tokens of each prompt and of its completion."""


def models(method: str, family: str, *, temperature: float = 1.0) -> tuple[Roles, PeftModel]:
    """Return policy and value model, and a trained reward model, on one base."""
    base = base_of(family, first_choice(method))
    scorers = [scorer_on(base, ["reward"], pad_id=0) for _ in range(2)]
    for seed, scorer in enumerate(scorers):
        torch.manual_seed(seed)
        nn.init.normal_(score_head(scorer).weight, std=0.1)
    value, reward = (build("lora", scorer) for scorer in scorers)
    train_scores(reward, BATCH)
    reward.requires_grad_(False)
    reward.zero_grad(set_to_none=True)
    policy = build(method, base)
    for other in (value, reward):
        own_weights(other, [policy])
    return Roles(policy, value, column=0, temperature=temperature), reward


def ids(seed: int = 0) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return prompts and completions of random tokens."""
    draw = np.random.default_rng(seed)
    prompts = [tuple(draw.integers(1, 90, length).tolist()) for length, _ in LENGTHS]
    return prompts, [tuple(draw.integers(1, 90, length).tolist()) for _, length in LENGTHS]


def episodes(roles: Roles, seed: int = 0) -> Episodes:
    """Return a rollout of random values, 0 after the end of each completion."""
    prompts, completions = ids(seed)
    longest = max(map(len, completions))
    mask = token_mask(torch.tensor([len(one) for one in completions]), longest)
    torch.manual_seed(seed)
    tables = [torch.randn(len(prompts), longest) * mask for _ in range(5)]
    return Episodes(tuple(range(len(prompts))), tuple(prompts), tuple(completions), Tables(*tables))


def replies(rewards: Sequence[float], stopped: Sequence[bool] | None = None) -> Replies:
    """Return completions with these rewards."""
    prompts, completions = ids()
    ends = stopped or [True] * len(prompts)
    return Replies(
        [Prompt((), own, f"rows:{index}", None) for index, own in enumerate(prompts)],
        [Completion(own, end) for own, end in zip(completions, ends, strict=True)],
        [f"text {index}" for index in range(len(prompts))],
        Judged(np.asarray(rewards), {"reward": np.asarray(rewards)}),
    )
