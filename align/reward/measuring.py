"""What a reward model says of comparisons before and after training: metrics, samples, and its zero."""

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
"""Training comparisons whose chosen completions give a head's zero: it is then good to 3 % of a deviation."""
NUMBERS = ("loss", "accuracy", "margin")


@dataclass(frozen=True)
class Measuring:
    """A reward model and the comparisons that it is measured on.

    Attributes:
        model: base with adapter and head.
        data: what is learnt and what is held out.
        names: of the heads.
        heads: for each source the number of its head.
        collate: the layout.
        size: groups of a forward pass.
    """

    model: nn.Module
    data: PreparedPreferences
    names: list[str]
    heads: tuple[int, ...]
    collate: RewardCollator
    size: int

    def metrics(self) -> dict[str, float]:
        """Return the held-out loss, accuracy and margin, for a curve over the steps."""
        assert self.data.held_out is not None
        scores = self._scores(self._groups(self.data.held_out))
        facts = measured(of_own_heads(scores, self.data.held_out, self.heads))
        return {f"held_out_{name}": facts[name] for name in NUMBERS}

    def record(self, run: RunDirectory, encoder: Encoder, when: str, *, samples: int) -> None:
        """Record what the model says of the held-out comparisons, ``before`` or ``after`` training.

        Without held-out rows the samples alone, of training rows. A resumed run keeps what its first start
        measured before.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
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
            raise NotFiniteError(f"a score of the held-out comparisons is no number {when} training")
        if held_out is not None:
            facts = self._facts(scores, held_out)
            metrics = {f"held_out_{name}_{when}": facts["all"][name] for name in NUMBERS}
            metrics |= {
                f"held_out_accuracy_{name}_{when}": part["accuracy"] for name, part in facts["heads"].items()
            }
            run.update(comparisons={when: facts}, metrics=metrics)
        self._sample(run, encoder, when, groups=groups, scores=scores, shown=shown)

    def zero(self, run: RunDirectory) -> None:
        """Record each head's mean and deviation over chosen completions of its training rows.

        Bradley-Terry leaves a constant free. Ziegler et al. (arXiv 1909.08593, section 2.1) bring rewards to
        mean 0 and variance 1, InstructGPT (arXiv 2203.02155, section 3.5) takes the mean over demonstrations
        off before PPO: the chosen completions are what is nearest to demonstrations here.

        Raises:
            UserError: a head gives the same score to all of them: it has learnt nothing.
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
                told = f"head '{name}' gives {mean} to each of {int(best.sum())} completions"
                raise UserError(Problem("reward.heads", told, "scores that differ", "train for more steps"))
            found[name] = {"mean": mean, "deviation": deviation, "completions": int(best.sum())}
        run.update(normalisation=found)

    def _scores(self, groups: list[TokenizedGroup]) -> Numbers:
        """Return the scores of all completions, (N, heads); each process scores its share of the groups."""
        own = share_in_step(groups)
        scores = score_groups(self.model, [group for group, _ in own], self.collate, size=self.size)
        ends = np.cumsum([len(group.completion_ids) for group, _ in own])
        parts = zip(np.split(scores, ends[:-1]), own, strict=True)
        return np.concatenate(together(everyones([part for part, (_, counts) in parts if counts])))

    def _groups(self, rows: PreferenceGroups) -> list[TokenizedGroup]:
        return [rows[index] for index in range(len(rows))]

    def _facts(self, scores: Numbers, rows: PreferenceGroups) -> dict[str, Any]:
        """Return what is told of all held-out comparisons, and of each head's and each source's own."""
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
        """Put what the model says of a few comparisons beside their texts."""
        ends = np.cumsum([len(group.completion_ids) for group in groups])
        lines = []
        for index, earlier in zip(shown, run.samples() or [{} for _ in shown], strict=True):
            group = groups[index]
            own = scores[ends[index] - len(group.completion_ids) : ends[index], self.heads[group.source]]
            said = [f"{place}: {score:.2f}" for place, score in zip(_places(group), own, strict=True)]
            lines.append(_words(group, encoder) | earlier | {when: "\n".join(said)})
        run.write(SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _places(group: TokenizedGroup) -> list[str]:
    """Return what each completion's place in the comparison is called."""
    if len(group.ranks) == 2:
        return ["better", "worse"]
    return [f"place {rank + 1}" for rank in group.ranks.tolist()]


def _words(group: TokenizedGroup, encoder: Encoder) -> dict[str, str]:
    prompt = encoder.tokenizer.decode(group.prompt_ids.tolist(), skip_special_tokens=True)
    texts = [encoder.decode_reply(ids.tolist()) for ids in group.completion_ids]
    said = [f"{place}: {text}" for place, text in zip(_places(group), texts, strict=True)]
    return {"prompt": str(prompt).strip(), "expected": "\n".join(said)}
