"""Held-out evaluation of sampled completions: reward, KL to the reference, length, EOS rate."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from align.preference.starting_policy import StartingPolicy, arithmetic
from align.rl.measures import of_distance, of_replies
from align.rl.prompts import Prompt
from align.rl.reading import Said, lay_out, policy_tables
from align.rl.replies import Replies, judged_replies
from align.rl.rewards.rewards import Rewards
from align.rl.rollout import Completion, Sampling, sample
from finetune.data.tokens import Encoder
from finetune.training.loading import Policy
from finetune.training.preflight.untouched import untouched


@dataclass(frozen=True)
class HeldOut:
    """Evaluates the policy on held-out prompts.

    Attributes:
        prompts: the held-out prompts.
        policy: the trained policy.
        reference_policy: the initial policy.
        rewards: score the completions.
        encoder: decodes completions to text.
        sampling: sampling parameters.
        seed: sampling seed, the same before, during and after training.
        micro_batch_size: completions per forward pass.
    """

    prompts: Sequence[Prompt]
    policy: Policy
    start: StartingPolicy
    rewards: Rewards
    encoder: Encoder
    sampling: Sampling
    seed: int
    size: int

    def measure(self) -> dict[str, float]:
        """Return the metrics of one completion per prompt, always sampled with the same seed.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        replies = self.answer()
        said = read(
            self.policy,
            replies.prompts,
            replies.completions,
            sampling=self.sampling,
            size=self.size,
            reference=self.start.in_place,
        )
        return of_replies(replies) | of_distance(replies, said)

    def answer(self) -> Replies:
        """Sample one completion per prompt and score it."""
        ids = [prompt.ids for prompt in self.prompts]
        completions = sample(self.policy.model, ids, sampling=self.sampling, seed=self.seed)
        return judged_replies(self.prompts, completions, self.rewards, self.encoder)


@torch.no_grad()
def read(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    sampling: Sampling,
    size: int,
    reference: Callable[[], AbstractContextManager[None]],
) -> Said:
    """Return policy and reference log-probabilities and entropies of the completions' tokens; values are 0.

    Args:
        policy: the policy that sampled.
        prompts: prompt of each completion.
        completions: the sampled completions.
        sampling: sampling parameters.
        micro_batch_size: completions per forward pass.
        as_reference: context manager that turns the policy into the reference.
    """
    model, pad, temperature = policy.model, sampling.stop_ids[0], sampling.temperature
    device = next(model.parameters()).device
    widths = np.array([len(one.ids) for one in completions])
    tables = [torch.zeros(len(widths), int(widths.max())) for _ in range(3)]
    order = np.argsort(-widths, kind="stable").tolist()
    # Evaluation happens between training steps: dropout mode and random state must survive it.
    with untouched(model), arithmetic(model, policy.precision):
        for first in range(0, len(order), size):
            part = order[first : first + size]
            ids = [prompts[i].ids for i in part], [completions[i].ids for i in part]
            laid: Mapping[str, Any] = lay_out(*ids, pad_id=pad)
            batch = {name: value.to(device) for name, value in laid.items()}
            logps, entropies = policy_tables(model, batch, temperature=temperature, spread=True)
            with reference():
                theirs, _ = policy_tables(model, batch, temperature=temperature, spread=False)
            for table, found in zip(tables, (logps, theirs, entropies), strict=True):
                table[part, : found.shape[1]] = found.float().cpu()
    logps, theirs, entropies = tables
    return Said(logps, theirs, torch.zeros_like(logps), entropies)
