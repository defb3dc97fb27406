"""Reward model evaluation before and after training: held-out metrics, samples, reward normalization."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from torch import nn

from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences, TokenizedGroup
from align.reward.batch import RewardCollator, score_groups
from align.reward.metrics import ScoredComparisons, comparison_metrics
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import all_gather_object, shard_padded, unshard
from finetune.distributed.interrupts import NotFiniteError
from finetune.evaluation.calibration import FloatArray
from finetune.recipe.errors import Problem, UserError
from finetune.training.metric_specs import When
from finetune.training.run_directory import SAMPLES, RunDirectory
from finetune.training.samples import evenly_spaced

NORMALIZATION_ROWS = 1000
"""Training comparisons for reward normalization: the standard error of the mean is then 3 % of the std."""
HELD_OUT_METRICS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


@dataclass(frozen=True)
class RewardEvaluator:
    """Evaluate a reward model on training and held-out comparisons.

    Attributes:
        model: base with adapter and head.
        data: training and held-out comparisons.
        head_names: names of the heads.
        head_of_source: index of the head of each data source.
        collator: the collator.
        batch_size: groups per forward pass.
    """

    model: nn.Module
    data: PreparedPreferences
    head_names: list[str]
    head_of_source: tuple[int, ...]
    collator: RewardCollator
    batch_size: int

    def metrics(self) -> dict[str, float]:
        """Return held-out loss, accuracy and margin, for metrics.jsonl."""
        assert self.data.held_out is not None
        scores = self._scores(list(self.data.held_out))
        metrics = comparison_metrics(select_head_scores(scores, self.data.held_out, self.head_of_source))
        return {name: metrics[key] for name, key in HELD_OUT_METRICS.items()}

    def record(self, run: RunDirectory, encoder: Encoder, when: When, *, samples: int) -> dict[str, float]:
        """Return held-out loss, accuracy and margin; record them in detail, and the scores of some samples.

        Without held-out rows only samples are recorded, from training rows.

        Args:
            run: receives ``preference_data`` and samples.jsonl.
            encoder: decodes the samples.
            when: ``before`` or ``after`` training.
            samples: number of samples.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
        held_out = self.data.held_out
        # A resumed run keeps the samples of its first start.
        if held_out is None and when == "before" and run.samples():
            return {}
        groups = list(self.data.train if held_out is None else held_out)
        sample_indices = evenly_spaced(len(groups), samples)
        if held_out is None:
            # No metrics without held-out rows: score the samples alone, not all training rows.
            groups = [groups[index] for index in sample_indices]
            sample_indices = list(range(len(groups)))
        if not groups:
            return {}
        scores = self._scores(groups)
        if not np.isfinite(scores).all():
            raise NotFiniteError(f"a score of the held-out comparisons is NaN or infinite {when} training")
        metrics: dict[str, float] = {}
        if held_out is not None:
            comparisons = self._comparison_metrics(scores, held_out)
            run.update(preference_data={when: comparisons})
            metrics = {name: comparisons["all"][key] for name, key in HELD_OUT_METRICS.items()}
            metrics |= {
                f"rewards/accuracies/{name}": head_metrics["accuracy"]
                for name, head_metrics in comparisons["heads"].items()
            }
        self._write_samples(run, encoder, when, groups=groups, scores=scores, sample_indices=sample_indices)
        return metrics

    def record_normalization(self, run: RunDirectory) -> None:
        """Record each head's mean and standard deviation over chosen completions of its training rows.

        The Bradley-Terry loss is invariant to a constant offset. Ziegler et al. (arXiv 1909.08593, section
        2.1) normalize rewards to mean 0 and variance 1; InstructGPT (arXiv 2203.02155, section 3.5) subtracts
        the mean over demonstrations before PPO. Chosen completions are the closest to demonstrations here.

        Raises:
            UserError: a head gives every completion the same score.
        """
        train, normalization = self.data.train, {}
        head_ids = np.asarray(self.head_of_source)[list(train.source_ids)]
        for head, name in enumerate(self.head_names):
            row_ids = np.flatnonzero(head_ids == head)
            groups = [train[int(row_ids[index])] for index in evenly_spaced(len(row_ids), NORMALIZATION_ROWS)]
            scores = self._scores(groups)[:, head]
            # Completions that share the best rank all count as chosen.
            is_best = np.concatenate([group.ranks for group in groups]) == 0
            mean, std = float(scores[is_best].mean()), float(scores[is_best].std())
            # `not std > 0` is also true of NaN.
            if not std > 0 or not isfinite(mean):
                detail = f"head '{name}' scores all {int(is_best.sum())} chosen completions {mean}"
                raise UserError(
                    Problem(
                        "reward.heads",
                        detail,
                        "different scores for different completions",
                        "train for more steps",
                    )
                )
            normalization[name] = {"mean": mean, "std": std, "completions": int(is_best.sum())}
        run.update(reward_normalization=normalization)

    def _scores(self, groups: list[TokenizedGroup]) -> FloatArray:
        """Return the scores of all completions, (C, heads); each rank scores its shard of the groups."""
        shard = shard_padded(groups)
        scores = score_groups(
            self.model, [group for group, _ in shard], self.collator, batch_size=self.batch_size
        )
        group_ends = np.cumsum([len(group.completion_ids) for group, _ in shard])
        # The last end is the length: np.split would add an empty piece.
        chunks = zip(np.split(scores, group_ends[:-1]), shard, strict=True)
        # Padding groups, which keep the ranks' collectives in step, are dropped before the gather.
        return np.concatenate(
            unshard(all_gather_object([chunk for chunk, (_, is_real) in chunks if is_real]))
        )

    def _comparison_metrics(self, scores: FloatArray, rows: PreferenceGroups) -> dict[str, Any]:
        """Return held-out metrics over all comparisons, per head and per data source."""
        comparisons = select_head_scores(scores, rows, self.head_of_source)
        source_ids = np.asarray(rows.source_ids)
        head_ids = np.asarray(self.head_of_source)[source_ids]
        source_names = [source.source for source in self.data.report.sources]
        mixed_sources = sorted(set(source_ids.tolist())) if len(source_names) > 1 else []
        return {
            "all": comparison_metrics(comparisons),
            "heads": {
                name: comparison_metrics(comparisons.select(head_ids == index))
                for index, name in enumerate(self.head_names)
                if len(self.head_names) > 1 and (head_ids == index).any()
            },
            "sources": {
                source_names[index]: comparison_metrics(comparisons.select(source_ids == index))
                for index in mixed_sources
            },
        }

    def _write_samples(
        self,
        run: RunDirectory,
        encoder: Encoder,
        when: When,
        *,
        groups: list[TokenizedGroup],
        scores: FloatArray,
        sample_indices: list[int],
    ) -> None:
        """Write the scores of a few comparisons with their texts to the samples file."""
        group_ends = np.cumsum([len(group.completion_ids) for group in groups])
        samples = []
        for index, previous in zip(
            sample_indices, run.samples() or [{} for _ in sample_indices], strict=True
        ):
            group = groups[index]
            group_scores = scores[
                group_ends[index] - len(group.completion_ids) : group_ends[index],
                self.head_of_source[group.source],
            ]
            labeled_scores = [
                f"{label}: {score:.2f}"
                for label, score in zip(_rank_labels(group), group_scores, strict=True)
            ]
            # Merged with the entry of the evaluation before training, whose scores stay.
            samples.append(_sample_texts(group, encoder) | previous | {when: "\n".join(labeled_scores)})
        run.write(SAMPLES, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def select_head_scores(
    scores: FloatArray, groups: PreferenceGroups, head_of_source: Sequence[int]
) -> ScoredComparisons:
    """Select each comparison's scores under the head of its data source.

    Args:
        scores: (C, heads).
        groups: the scored comparisons.
        head_of_source: index of the head of each data source.
    """
    head_ids = np.repeat(np.asarray(head_of_source)[list(groups.source_ids)], groups.num_completions)
    rewards = scores[np.arange(len(scores)), head_ids]
    return ScoredComparisons(rewards, groups.ranks, groups.completion_lengths, groups.num_completions)


def _rank_labels(group: TokenizedGroup) -> list[str]:
    """Return a label for each completion's rank."""
    if len(group.ranks) == 2:
        return ["better", "worse"]
    return [f"place {rank + 1}" for rank in group.ranks.tolist()]


def _sample_texts(group: TokenizedGroup, encoder: Encoder) -> dict[str, str]:
    prompt = encoder.tokenizer.decode(group.prompt_ids.tolist(), skip_special_tokens=True)
    texts = [encoder.decode_reply(ids.tolist()) for ids in group.completion_ids]
    labeled_texts = [f"{label}: {text}" for label, text in zip(_rank_labels(group), texts, strict=True)]
    return {"prompt": str(prompt).strip(), "expected": "\n".join(labeled_texts)}
