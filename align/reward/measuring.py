"""Reward model evaluation before and after training: held-out metrics, samples, reward normalization."""

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from torch import nn

from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences, TokenizedGroup
from align.reward.collate import RewardCollator
from align.reward.measures import Numbers, measured
from align.reward.scoring import of_own_heads, score_groups
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.training.processes import everyones, share_in_step, together
from finetune.training.run_directory import SAMPLES, RunDirectory
from finetune.training.samples import spread
from finetune.training.stops import NotFiniteError

CENTRE_ROWS = 1000
"""Training comparisons for reward normalization: the standard error of the mean is then 3 % of the std."""
NUMBERS = ("loss", "accuracy", "margin")


@dataclass(frozen=True)
class Measuring:
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
    names: list[str]
    heads: tuple[int, ...]
    collate: RewardCollator
    size: int

    def metrics(self) -> dict[str, float]:
        """Return held-out loss, accuracy and margin, for metrics.jsonl."""
        assert self.data.held_out is not None
        scores = self._scores(self._groups(self.data.held_out))
        facts = measured(of_own_heads(scores, self.data.held_out, self.heads))
        return {f"held_out_{name}": facts[name] for name in NUMBERS}

    def record(self, run: RunDirectory, encoder: Encoder, when: str, *, samples: int) -> None:
        """Record held-out metrics and samples ``before`` or ``after`` training.

        Without held-out rows only samples are recorded, from training rows.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
        # A resumed run keeps the metrics of its first start: the model is no longer untrained.
        if when == "before" and (when in run.record.get("comparisons", {}) or run.samples()):
            return
        held_out = self.data.held_out
        groups = self._groups(self.data.train if held_out is None else held_out)
        shown = spread(len(groups), samples)
        if held_out is None:
            groups, shown = [groups[index] for index in shown], list(range(len(shown)))
        if not groups:
            return
        scores = self._scores(groups)
        if not np.isfinite(scores).all():
            raise NotFiniteError(f"a score of the held-out comparisons is NaN or infinite {when} training")
        if held_out is not None:
            facts = self._facts(scores, held_out)
            metrics = {f"held_out_{name}_{when}": facts["all"][name] for name in NUMBERS}
            metrics |= {
                f"held_out_accuracy_{name}_{when}": part["accuracy"] for name, part in facts["heads"].items()
            }
            run.update(comparisons={when: facts}, metrics=metrics)
        self._sample(run, encoder, when, groups=groups, scores=scores, shown=shown)

    def zero(self, run: RunDirectory) -> None:
        """Record each head's mean and standard deviation over chosen completions of its training rows.

        The Bradley-Terry loss is invariant to a constant offset. Ziegler et al. (arXiv 1909.08593, section
        2.1) normalize rewards to mean 0 and variance 1; InstructGPT (arXiv 2203.02155, section 3.5) subtracts
        the mean over demonstrations before PPO. Chosen completions are the closest to demonstrations here.

        Raises:
            UserError: a head gives every completion the same score.
        """
        rows, found = self.data.train, {}
        owners = np.asarray(self.heads)[list(rows.sources)]
        for number, name in enumerate(self.names):
            own = np.flatnonzero(owners == number)
            groups = [rows[int(own[index])] for index in spread(len(own), CENTRE_ROWS)]
            scores = self._scores(groups)[:, number]
            best = np.concatenate([group.ranks for group in groups]) == 0
            mean, deviation = float(scores[best].mean()), float(scores[best].std())
            if not deviation > 0 or not isfinite(mean):
                told = f"head '{name}' scores all {int(best.sum())} chosen completions {mean}"
                raise UserError(
                    Problem(
                        "reward.heads",
                        told,
                        "different scores for different completions",
                        "train for more steps",
                    )
                )
            found[name] = {"mean": mean, "deviation": deviation, "completions": int(best.sum())}
        run.update(normalisation=found)

    def _scores(self, groups: list[TokenizedGroup]) -> Numbers:
        """Return the scores of all completions, (C, heads); each rank scores its shard of the groups."""
        own = share_in_step(groups)
        scores = score_groups(self.model, [group for group, _ in own], self.collate, size=self.size)
        ends = np.cumsum([len(group.completion_ids) for group, _ in own])
        parts = zip(np.split(scores, ends[:-1]), own, strict=True)
        # Padding groups, which keep the ranks' collectives in step, are dropped before the gather.
        return np.concatenate(together(everyones([part for part, (_, counts) in parts if counts])))

    def _groups(self, rows: PreferenceGroups) -> list[TokenizedGroup]:
        return [rows[index] for index in range(len(rows))]

    def _facts(self, scores: Numbers, rows: PreferenceGroups) -> dict[str, Any]:
        """Return held-out metrics over all comparisons, per head and per data source."""
        scored = of_own_heads(scores, rows, self.heads)
        sources = np.asarray(rows.sources)
        owners = np.asarray(self.heads)[sources]
        names = [source.source for source in self.data.report.sources]
        several = sorted(set(sources.tolist())) if len(names) > 1 else []
        return {
            "all": measured(scored),
            "heads": {
                name: measured(scored.only(owners == number))
                for number, name in enumerate(self.names)
                if len(self.names) > 1 and (owners == number).any()
            },
            "sources": {names[number]: measured(scored.only(sources == number)) for number in several},
        }

    def _sample(
        self,
        run: RunDirectory,
        encoder: Encoder,
        when: str,
        *,
        groups: list[TokenizedGroup],
        scores: Numbers,
        shown: list[int],
    ) -> None:
        """Write the scores of a few comparisons with their texts to the samples file."""
        ends = np.cumsum([len(group.completion_ids) for group in groups])
        lines = []
        for index, earlier in zip(shown, run.samples() or [{} for _ in shown], strict=True):
            group = groups[index]
            own = scores[ends[index] - len(group.completion_ids) : ends[index], self.heads[group.source]]
            said = [f"{place}: {score:.2f}" for place, score in zip(_places(group), own, strict=True)]
            lines.append(_words(group, encoder) | earlier | {when: "\n".join(said)})
        run.write(SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _places(group: TokenizedGroup) -> list[str]:
    """Return a label for each completion's rank."""
    if len(group.ranks) == 2:
        return ["better", "worse"]
    return [f"place {rank + 1}" for rank in group.ranks.tolist()]


def _words(group: TokenizedGroup, encoder: Encoder) -> dict[str, str]:
    prompt = encoder.tokenizer.decode(group.prompt_ids.tolist(), skip_special_tokens=True)
    texts = [encoder.decode_reply(ids.tolist()) for ids in group.completion_ids]
    said = [f"{place}: {text}" for place, text in zip(_places(group), texts, strict=True)]
    return {"prompt": str(prompt).strip(), "expected": "\n".join(said)}
