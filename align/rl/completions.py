"""Sampled completions with their text and reward scores, and the metrics of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.rl.maths.masked import masked_mean
from align.rl.prompts import PreparedPrompts, Prompt
from align.rl.rewards.rewards import Rewards, RewardScores
from align.rl.token_stats import TokenStats, token_mask
from data_templates.segments import Message
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import all_gather_object, shard, unshard
from finetune.generation.sampler import SampledCompletion
from finetune.recipe.user_arguments import completion_row
from finetune.training.held_out_file import graded_entry
from finetune.training.preflight.checks import CheckResult


@dataclass(frozen=True)
class ScoredCompletions:
    """C sampled completions with prompts, texts and reward scores."""

    prompts: Sequence[Prompt]
    samples: Sequence[SampledCompletion]
    texts: Sequence[str]
    scores: RewardScores

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each completion: (C,)."""
        return torch.tensor([len(sample.ids) for sample in self.samples])

    @property
    def ended_with_eos(self) -> Tensor:
        """Return which completions ended with EOS: (C,) bool."""
        return torch.tensor([sample.ended_with_eos for sample in self.samples])

    @property
    def rewards(self) -> Tensor:
        """Return the total rewards, which are maximized: (C,) float32."""
        return torch.from_numpy(np.asarray(self.scores.total)).float()


def score_completions(
    prompts: Sequence[Prompt], completions: Sequence[SampledCompletion], rewards: Rewards, encoder: Encoder
) -> ScoredCompletions:
    """Decode completions and score them; each process scores a shard, and all get all scores.

    Raises:
        UserError: a reward function raised or did not return a number.
    """
    texts = [encoder.decode_reply(list(completion.ids)) for completion in completions]
    conversations = [
        [*prompt.messages, Message("assistant", text)] for prompt, text in zip(prompts, texts, strict=True)
    ]
    # Shard by runs of equal prompts: a reward model encodes a prompt once for its consecutive completions.
    groups = [list(group) for _, group in groupby(range(len(prompts)), key=lambda index: prompts[index].ids)]
    # Each process scores a shard, and the order is restored afterwards.
    local_indices = [index for group in shard(groups) for index in group]
    local_scores = rewards.score(
        [conversations[index] for index in local_indices],
        [prompts[index].location for index in local_indices],
        expected=[prompts[index].expected for index in local_indices],
    )
    return ScoredCompletions(
        prompts, completions, texts, _all_gather_scores(local_scores, [len(group) for group in shard(groups)])
    )


def _all_gather_scores(local_scores: RewardScores, group_sizes: Sequence[int]) -> RewardScores:
    """All-gather reward scores; ``group_sizes`` are the numbers of completions in this process's runs."""
    names = list(local_scores.by_source)
    stacked = np.stack([local_scores.total, *local_scores.by_source.values()])
    # Split into the groups that were sharded, whose order `unshard` restores. The last cut is the end, after
    # which is an empty piece; dtype, because the sums of an empty shard would be floats.
    chunks = np.split(stacked, np.cumsum(group_sizes, dtype=int), axis=1)[:-1]
    total, *by_source = np.concatenate(unshard(all_gather_object(chunks)), axis=1)
    return RewardScores(total, dict(zip(names, by_source, strict=True)))


KeepGraded = Callable[[Sequence[Mapping[str, Any]]], None]
"""Receives the entries of held_out.jsonl."""


def scored_entries(
    completions: ScoredCompletions, grades: Mapping[str, Sequence[float | None]] | None = None
) -> list[dict[str, Any]]:
    """Return the entries of held_out.jsonl of scored completions, with rewards and grades."""
    entries = []
    pairs = zip(completions.prompts, completions.texts, strict=True)
    for index, (prompt, text) in enumerate(pairs):
        row = completion_row(
            [*prompt.messages, Message("assistant", text)], prompt.location, reference=prompt.expected
        )
        by_source = {name: float(values[index]) for name, values in completions.scores.by_source.items()}
        entries.append(
            graded_entry(
                row,
                ended_with_eos=completions.samples[index].ended_with_eos,
                grades={name: values[index] for name, values in (grades or {}).items()},
                reward=float(completions.scores.total[index]),
                rewards=by_source,
            )
        )
    return entries


def check_rewards(rewards: Rewards, data: PreparedPrompts) -> CheckResult:
    """Check the rewards on the recipe's prompts before anything is sampled or written.

    Raises:
        UserError: a reward function fails, or needs values that some rows lack.
        NotFiniteError: a reward model returns NaN or infinity.
    """
    # Held-out rows too: a missing value would stop the run only at its first evaluation.
    for prompts in filter(None, (data.train, data.held_out)):
        rewards.check_values([prompt.expected for prompt in prompts], prompts.locations)
    expected = [row.expected for row in data.train]
    return rewards.check([row.messages for row in data.train], data.train.locations, expected=expected)


def completion_metrics(completions: ScoredCompletions) -> dict[str, float]:
    """Return means over completions: reward and its sources, length, EOS rate, unique fraction."""
    lengths_C = completions.lengths.double()
    by_source = {
        f"rewards/{name}": float(np.mean(scores)) for name, scores in completions.scores.by_source.items()
    }
    return {
        "objective/reward": float(np.mean(completions.scores.total)),
        **(by_source if len(by_source) > 1 else {}),
        "val/completion_length": float(lengths_C.mean()),
        "val/eos_rate": float(completions.ended_with_eos.double().mean()),
        "val/unique_fraction": len(set(completions.texts)) / len(completions.texts),
        "val/length_reward_corr": correlation(lengths_C.numpy(), np.asarray(completions.scores.total)),
    }


def kl_metrics(completions: ScoredCompletions, stats: TokenStats) -> dict[str, float]:
    """Return KL to the reference (k1, nats per completion), entropy per token, and reference perplexity.

    The perplexity is that of the completions under the reference model: high for text it would not generate.
    """
    mask_CT = token_mask(completions.lengths, stats.logps.shape[1])
    # Both are 0 after the end of a completion, so the sum needs no mask.
    kl = (stats.logps - stats.reference_logps).double().sum(1).mean()
    return {
        "objective/kl_per_completion": float(kl),
        "policy/entropy": float(masked_mean(stats.entropies, mask_CT)),
        "val/ref_perplexity": float(torch.exp(-masked_mean(stats.reference_logps, mask_CT))),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's r; 0 if either input is constant."""
    scale = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / scale) if scale else 0.0
