"""PPO experience, the first half of an iteration: completions, rewards, token statistics, advantages.

``Rollouts`` samples one completion per prompt (``generate_and_score``) and reads log-probabilities and values
of its tokens (``score_tokens``); ``shape_rewards`` and ``advantages_and_returns`` make a ``Rollout`` of them,
which the trainer updates on.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from align.ppo.actor_critic import ActorCritic
from align.ppo.settings import PPOSettings
from align.preference.groups import GroupBatch
from align.preference.reference_policy import ReferencePolicy, autocast_for
from align.rl.completions import ScoredCompletions, score_completions
from align.rl.maths import advantages, kl, masked
from align.rl.prompts import Prompt
from align.rl.rewards.rewards import Rewards
from align.rl.sampling import Sampling, sample_completions
from align.rl.token_stats import TokenStats, collate_completions, token_logps_and_entropy, token_mask
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import all_gather_object, shard, shard_padded

TokenIdTuple = tuple[int, ...]


class RolloutBatch(GroupBatch):
    """One micro-batch of a rollout: one row per completion. C completions, T tokens of the longest one.

    Attributes:
        row_ids: (C,) index of each completion's prompt.
        mask: (C, T) bool, true at the tokens of a completion.
        old_logps, old_values, advantages, returns: (C, T), 0 after the end of a completion.
    """

    row_ids: Tensor
    mask: Tensor
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class RolloutTensors:
    """Per-token tensors of a rollout: (C, T) = completions x longest completion, 0 after the end of each.

    Attributes:
        logps: log-probabilities under the sampling policy (old policy).
        reference_logps: log-probabilities under the reference policy.
        values: value estimates at sampling time (old values).
        advantages: GAE advantages, whitened if ``ppo.whiten_advantages``.
        returns: regression targets of the value model.
    """

    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Rollout:
    """The completions of a rollout, in the order in which they were sampled.

    Attributes:
        prompt_indices: (C,) index of each completion's prompt.
        prompts: token ids of each completion's prompt.
        completions: token ids, including EOS if the completion has one.
        tensors: per-token tensors.
    """

    prompt_indices: tuple[int, ...]
    prompts: tuple[TokenIdTuple, ...]
    completions: tuple[TokenIdTuple, ...]
    tensors: RolloutTensors

    def __len__(self) -> int:
        return len(self.prompt_indices)

    @classmethod
    def build(
        cls, prompt_indices: Sequence[int], completions: ScoredCompletions, tensors: RolloutTensors
    ) -> "Rollout":
        """Return the rollout that the PPO epochs train on."""
        prompt_ids = tuple(prompt.ids for prompt in completions.prompts)
        return cls(
            tuple(prompt_indices), prompt_ids, tuple(sample.ids for sample in completions.samples), tensors
        )

    @property
    def total_lengths(self) -> list[int]:
        """Return the tokens of prompt plus completion: (C,)."""
        return [
            len(prompt) + len(completion)
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]

    def batch(self, indices: Sequence[int], *, pad_id: int) -> RolloutBatch:
        """Collate the completions at ``indices`` into one micro-batch."""
        group_batch = collate_completions(
            [self.prompts[i] for i in indices], [self.completions[i] for i in indices], pad_id=pad_id
        )
        max_length, indices_C = int(group_batch["lengths"].max()), torch.tensor(indices)
        tensors = self.tensors
        # Cut to this micro-batch's longest completion: the stored tensors have the width of the rollout.
        return {
            **group_batch,
            # BaseTrainer names these rows if the loss is NaN.
            "row_ids": torch.tensor([self.prompt_indices[i] for i in indices]),
            "mask": token_mask(group_batch["lengths"], max_length),
            "old_logps": tensors.logps[indices_C, :max_length],
            "old_values": tensors.values[indices_C, :max_length],
            "advantages": tensors.advantages[indices_C, :max_length],
            "returns": tensors.returns[indices_C, :max_length],
        }


@dataclass
class Rollouts:
    """Generates and scores completions with policy, reference, value and reward models.

    Attributes:
        actor_critic: policy and value model.
        reference_policy: the initial policy.
        rewards: the rewards to maximize.
        encoder: decodes completions to text.
        sampling: sampling parameters.
        precision: of forward passes.
        micro_batch_size: completions per forward pass.
        seconds: time spent per kind of work since the last rollout.
    """

    actor_critic: ActorCritic
    reference_policy: ReferencePolicy
    rewards: Rewards
    encoder: Encoder
    sampling: Sampling
    precision: str
    micro_batch_size: int
    seconds: dict[str, float] = field(default_factory=dict)

    def generate_and_score(self, prompts: Sequence[Prompt], *, seed: int) -> ScoredCompletions:
        """Sample one completion per prompt and score it.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        with self.timed("generation"):
            prompt_ids = [prompt.ids for prompt in prompts]
            completions = sample_completions(
                self.actor_critic.policy, prompt_ids, sampling=self.sampling, seed=seed
            )
        with self.timed("scoring"):
            return score_completions(prompts, completions, self.rewards, self.encoder)

    @torch.no_grad()
    def score_tokens(
        self, completions: ScoredCompletions, micro_batches: Sequence[Sequence[int]]
    ) -> TokenStats:
        """Return policy and reference log-probabilities, values and entropies of the completions' tokens.

        Each process scores its shard of the micro-batches.

        Args:
            completions: the sampled completions.
            micro_batches: completion indices of each micro-batch; they cover every completion once.
        """
        max_length, num_completions = int(completions.lengths.max()), len(completions.samples)
        # Any token can be padding: it is on the right, where causal attention hides it from the completions.
        device, pad_id = next(self.actor_critic.parameters()).device, self.sampling.stop_ids[0]
        fields = ("logps", "reference_logps", "values", "entropies")
        tensors = {name: torch.zeros(num_completions, max_length) for name in fields}
        with self.timed("scoring"), autocast_for(self.actor_critic.policy, self.precision):
            # The same number on every rank: a sharded model all-gathers in each forward pass.
            for indices, _ in shard_padded(micro_batches):
                token_ids = (
                    [completions.prompts[i].ids for i in indices],
                    [completions.samples[i].ids for i in indices],
                )
                collated = collate_completions(*token_ids, pad_id=pad_id)
                batch = {
                    name: tensor.to(device) for name, tensor in collated.items() if isinstance(tensor, Tensor)
                }
                logps_CT, entropies_CT, values_CT, _ = self.actor_critic(batch, with_entropy=True)
                # Reference and policy share the base: the initial adapter weights are swapped in.
                with self.reference_policy.as_active():
                    reference_logps_CT, _ = token_logps_and_entropy(
                        self.actor_critic.policy,
                        batch,
                        temperature=self.actor_critic.temperature,
                        with_entropy=False,
                    )
                for name, stat_CT in zip(
                    fields, (logps_CT, reference_logps_CT, values_CT, entropies_CT), strict=True
                ):
                    # Float32 on the CPU: the rollout is kept for all PPO epochs, and is saved in checkpoints.
                    tensors[name][list(indices), : stat_CT.shape[1]] = stat_CT.float().cpu()
            # Without the repeated micro-batch of `shard_padded`: its rows belong to another rank.
            return TokenStats(
                **_all_gather_rows(tensors, [index for indices in shard(micro_batches) for index in indices])
            )

    def micro_batches(self, completions: ScoredCompletions) -> list[list[int]]:
        """Return micro-batches that cover all completions, sorted by length to reduce padding."""
        # A stable sort: with ties in another order the micro-batches would depend on numpy's build.
        lengths = np.array([len(sample.ids) for sample in completions.samples])
        order = np.argsort(-lengths, kind="stable").tolist()
        return [
            order[offset : offset + self.micro_batch_size]
            for offset in range(0, len(order), self.micro_batch_size)
        ]

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add the duration of the block to ``seconds[work]``."""
        started_at = time.monotonic()
        yield
        self.seconds[work] = self.seconds.get(work, 0.0) + time.monotonic() - started_at


def _all_gather_rows(tensors: dict[str, Tensor], local_rows: Sequence[int]) -> dict[str, Tensor]:
    """All-gather tensors: each process contributes its ``local_rows``."""
    for rows, rank_tensors in all_gather_object(
        (list(local_rows), {name: tensor[local_rows] for name, tensor in tensors.items()})
    ):
        for name, tensor in rank_tensors.items():
            tensors[name][rows] = tensor
    return tensors


def total_lengths(completions: ScoredCompletions) -> list[int]:
    """Return the tokens of prompt plus completion: (C,)."""
    return [
        len(prompt.ids) + len(sample.ids)
        for prompt, sample in zip(completions.prompts, completions.samples, strict=True)
    ]


def shape_rewards(
    completions: ScoredCompletions, settings: PPOSettings, reward_stats: advantages.RunningMeanStd
) -> Tensor:
    """Return the rewards that PPO maximizes: (C,); normalized, clipped, replaced if EOS is missing."""
    rewards = completions.rewards
    if settings.normalize_rewards == "running":
        rewards = reward_stats.normalize(rewards, shift_mean=True)
    if settings.reward_clip is not None:
        rewards = advantages.clip_rewards(rewards, limit=settings.reward_clip)
    # Last, so that neither normalization nor clipping changes the penalty.
    return advantages.apply_missing_eos_reward(
        rewards, completions.ended_with_eos, missing_eos_reward=settings.missing_eos_reward
    )


def advantages_and_returns(
    stats: TokenStats, rewards_C: Tensor, lengths_C: Tensor, *, kl_coef: float, settings: PPOSettings
) -> RolloutTensors:
    """Return the rollout's tensors with GAE advantages and returns per token.

    Args:
        stats: log-probabilities and values of the tokens, (C, T).
        rewards_C: (C,) shaped rewards.
        lengths_C: (C,) tokens of each completion.
        kl_coef: KL coefficient (beta) of the per-token penalty.
        settings: gamma, lambda, KL estimator, whitening.
    """
    mask_CT = token_mask(lengths_C, stats.logps.shape[1])
    # The KL penalty is part of the reward of every token; the score is paid at the last one.
    kl_CT = kl.kl_terms(stats.logps, stats.reference_logps, estimator=settings.kl_estimator)
    token_rewards_CT = advantages.token_rewards(kl_CT, rewards_C, lengths_C, kl_coef=kl_coef)
    # The mean is retained: a constant added to every token would reward or punish length.
    if settings.whiten_rewards:
        token_rewards_CT = masked.whiten(token_rewards_CT, mask_CT, shift_mean=False)
    advantages_CT, returns_CT = advantages.gae(
        token_rewards_CT, stats.values, mask_CT, gamma=settings.gamma, gae_lambda=settings.gae_lambda
    )
    if settings.whiten_advantages:
        # After the returns: the value model learns returns in the scale of the rewards.
        advantages_CT = masked.whiten(advantages_CT, mask_CT, shift_mean=True)
    return RolloutTensors(stats.logps, stats.reference_logps, stats.values, advantages_CT, returns_CT)
