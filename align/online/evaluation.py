"""Metrics of RLOO and GRPO, and held-out evaluation: reward, KL to the reference, length, EOS rate."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from align.preference.reference_policy import ReferencePolicy, autocast_for
from align.rl.completions import (
    KeepGraded,
    ScoredCompletions,
    completion_metrics,
    kl_metrics,
    score_completions,
    scored_entries,
)
from align.rl.prompts import Prompt
from align.rl.rewards.rewards import Rewards
from align.rl.sampling import Sampling, sample_completions
from align.rl.token_stats import TokenStats, collate_completions, token_logps_and_entropy
from finetune.data.tokens import Encoder
from finetune.generation.sampler import SampledCompletion
from finetune.training.metric_specs import MetricSpec
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.model import Policy, preserve_state

ONLINE_COMPLETION_CURVES = {
    "objective/reward": "reward (mean over completions)",
    "objective/kl_per_completion": "KL to the reference (nats per completion)",
    "val/completion_length": "completion length (tokens)",
    "val/eos_rate": "EOS rate",
    "policy/entropy": "policy entropy (nats per token)",
}
ONLINE_STEP_CURVES = {
    "loss": "training loss",
    "objective/reward_std": "standard deviation of the reward",
    "objective/frac_reward_zero_std": "fraction of prompts with equal rewards in the group",
}
ONLINE_SUMMARY_METRICS = {
    "eval/objective/reward": ("held-out reward", ".3f"),
    "eval/objective/kl_per_completion": ("held-out KL, nats per completion", ".2f"),
    "eval/val/completion_length": ("held-out completion length", ".1f"),
    "eval/val/eos_rate": ("held-out EOS rate", ".1%"),
}
ONLINE_FIRST_LAST_METRICS = (
    "loss",
    "objective/reward",
    "objective/kl_per_completion",
    "val/completion_length",
    "val/eos_rate",
    "policy/entropy",
    "objective/frac_reward_zero_std",
)
"""Training metrics that run.json records for the first and the last steps."""


def online_metric_spec(rewards: Sequence[str]) -> MetricSpec:
    """Return the curves and summary metrics for rewards of these names."""
    source_curves = {f"rewards/{name}": f"reward: {name}" for name in rewards} if len(rewards) > 1 else {}
    held_out_curves = {
        f"{EVAL_PREFIX}{name}": f"held-out {title}"
        for name, title in (ONLINE_COMPLETION_CURVES | source_curves).items()
    }
    return MetricSpec(
        allows_zero_gradients=True,
        curves=ONLINE_COMPLETION_CURVES | source_curves | ONLINE_STEP_CURVES | held_out_curves,
        summary=ONLINE_SUMMARY_METRICS,
        main="objective/reward",
        first_last=ONLINE_FIRST_LAST_METRICS,
    )


@dataclass(frozen=True)
class HeldOutEvaluation:
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
    reference_policy: ReferencePolicy
    rewards: Rewards
    encoder: Encoder
    sampling: Sampling
    seed: int
    micro_batch_size: int

    def evaluate(self, keep: KeepGraded | None = None) -> dict[str, float]:
        """Return the metrics of one completion per prompt, always sampled with the same seed.

        Args:
            keep: receives the entries of held_out.jsonl.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        completions = self.generate_and_score()
        stats = score_tokens(
            self.policy,
            completions.prompts,
            completions.samples,
            sampling=self.sampling,
            micro_batch_size=self.micro_batch_size,
            as_reference=self.reference_policy.as_active,
        )
        if keep is not None:
            keep(scored_entries(completions))
        return completion_metrics(completions) | kl_metrics(completions, stats)

    def generate_and_score(self) -> ScoredCompletions:
        """Sample one completion per prompt and score it."""
        prompt_ids = [prompt.ids for prompt in self.prompts]
        completions = sample_completions(
            self.policy.model, prompt_ids, sampling=self.sampling, seed=self.seed
        )
        return score_completions(self.prompts, completions, self.rewards, self.encoder)


@torch.no_grad()
def score_tokens(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[SampledCompletion],
    *,
    sampling: Sampling,
    micro_batch_size: int,
    as_reference: Callable[[], AbstractContextManager[None]],
) -> TokenStats:
    """Return policy and reference log-probabilities and entropies of the completions' tokens; values are 0.

    Args:
        policy: the policy that sampled.
        prompts: prompt of each completion.
        completions: the sampled completions.
        sampling: sampling parameters.
        micro_batch_size: completions per forward pass.
        as_reference: context manager that turns the policy into the reference.
    """
    model, pad_id, temperature = policy.model, sampling.stop_ids[0], sampling.temperature
    device = next(model.parameters()).device
    lengths = np.array([len(completion.ids) for completion in completions])
    tensors = [torch.zeros(len(lengths), int(lengths.max())) for _ in range(3)]
    # Sorted by length: less padding per forward pass.
    order = np.argsort(-lengths, kind="stable").tolist()
    # Evaluation happens between training steps: dropout mode and random state must survive it.
    with preserve_state(model), autocast_for(model, policy.precision):
        for offset in range(0, len(order), micro_batch_size):
            indices = order[offset : offset + micro_batch_size]
            token_ids = [prompts[i].ids for i in indices], [completions[i].ids for i in indices]
            collated: Mapping[str, Any] = collate_completions(*token_ids, pad_id=pad_id)
            batch = {name: tensor.to(device) for name, tensor in collated.items()}
            logps_CT, entropies_CT = token_logps_and_entropy(
                model, batch, temperature=temperature, with_entropy=True
            )
            # No gradient is recorded here, so the weights may be swapped between two forward passes.
            with as_reference():
                reference_logps_CT, _ = token_logps_and_entropy(
                    model, batch, temperature=temperature, with_entropy=False
                )
            for tensor_CT, stat_CT in zip(tensors, (logps_CT, reference_logps_CT, entropies_CT), strict=True):
                tensor_CT[indices, : stat_CT.shape[1]] = stat_CT.float().cpu()
    logps_CT, reference_logps_CT, entropies_CT = tensors
    # RLOO and GRPO have no value model.
    return TokenStats(logps_CT, reference_logps_CT, torch.zeros_like(logps_CT), entropies_CT)
