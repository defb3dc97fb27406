"""A finished reward model at work: scores of any completions, of every head, every rule and all together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from align.preference.attention import cost_of, why_separate
from align.preference.rows.dataset import TokenizedGroup
from align.preference.rows.encode import Room, fit
from align.preference.rows.fields import question
from align.reward.collate import RewardCollator
from align.reward.model import load_scorer
from align.reward.rules import Rule, saved_rules
from align.reward.scoring import score_groups
from align.reward.settings import RuleSettings
from align.reward.shared_base import scorer_on
from data_templates._segments import Message, TemplateError
from finetune.adapters._load import open_adapter
from finetune.data.tokens import Encoder
from finetune.planning.choices import TOKENS_PER_FORWARD
from finetune.planning.hardware import detect
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import finished_record
from finetune.recipe.settings import ModelSettings
from finetune.training.samples import question_of

Prompt = str | Sequence[Message]
Ids = list[int]
TOGETHER = 16
"""Completions of a prompt that share its line: attention costs the square of the line's length."""
TOTAL = "total"
"""The sum of all heads, each brought to mean 0 and deviation 1, and of all rules by their weights."""


@dataclass(frozen=True)
class RewardModel:
    """Base, adapter and heads of a finished run, with its rules.

    Attributes:
        model: it scores.
        encoder: how conversations become tokens.
        zeros: of each head the mean and the deviation over chosen completions of its training rows.
        rules: programs beside the heads.
        room: tokens of a prompt with its completion.
        collate: the layout of a forward pass.
        tokens: of a forward pass, about.
    """

    model: nn.Module
    encoder: Encoder
    zeros: Mapping[str, tuple[float, float]]
    rules: Sequence[Rule]
    room: Room
    collate: RewardCollator
    tokens: int

    @property
    def names(self) -> list[str]:
        """Return what is scored: heads, rules, and all together."""
        return [*self.zeros, *(rule.name for rule in self.rules), TOTAL]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, list[float]]:
        """Return the scores of completions, each behind its prompt; equal prompts side by side are read once.

        Args:
            prompts: one for each completion: a text (an HH dialogue too), or turns.
            completions: what is scored.

        Returns:
            Raw scores by the names of the heads, what rules say by theirs, and ``total``.

        Raises:
            UserError: the template cannot write a conversation, or a rule fails.
        """
        talks = [
            [*_turns(prompt), Message("assistant", text)]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        places = [f"completion {number}" for number in range(1, len(talks) + 1)]
        return self.score_talks(talks, places)

    def score_talks(
        self, talks: Sequence[Sequence[Message]], places: Sequence[str]
    ) -> dict[str, list[float]]:
        """Return the scores of conversations' last replies, as ``score`` does.

        Args:
            talks: conversations that end with a reply.
            places: what each one is called in a message.
        """
        if not talks:
            return {name: [] for name in self.names}
        raw = self._heads(talks, places)
        found = {name: raw[:, number].tolist() for number, name in enumerate(self.zeros)}
        total = sum(np.asarray(values) for values in self.normalised(found).values())
        prompts, completions = [question_of(talk) for talk in talks], [talk[-1].content for talk in talks]
        for rule in self.rules:
            found[rule.name] = rule.scores(prompts, completions, places)
            total = total + rule.weight * np.asarray(found[rule.name])
        return {**found, TOTAL: np.asarray(total).tolist()}

    def normalised(self, scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Return the heads' scores, with mean 0 and deviation 1 over chosen completions of the training."""
        return {
            name: ((np.asarray(scores[name]) - mean) / deviation).tolist()
            for name, (mean, deviation) in self.zeros.items()
        }

    def _heads(self, talks: Sequence[Sequence[Message]], places: Sequence[str]) -> np.ndarray:
        """Return raw scores (talks, heads); neighbours with one prompt share a group, some at a time."""
        pairs = [self._encoded(talk, place) for talk, place in zip(talks, places, strict=True)]
        groups = [
            _group(prompt, part)
            for prompt, own in groupby(pairs, key=lambda pair: pair[0])
            for part in _few([ids for _, ids in own])
        ]
        longest = max(len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups)
        return score_groups(self.model, groups, self.collate, size=max(1, self.tokens // longest))

    def _encoded(self, talk: Sequence[Message], place: str) -> tuple[Ids, Ids]:
        """Return the ids of prompt and reply, cut as in training."""
        try:
            encoded = self.encoder.encode(talk)
        except TemplateError as error:
            found = f"no conversation for template '{self.encoder.name}': {error}"
            raise UserError(Problem(place, found, "turns that the template can write")) from error
        if True not in encoded.trained:
            raise UserError(Problem(place, "its reply carries no token", "a reply"))
        start = encoded.trained.index(True)
        end = len(encoded.trained) - encoded.trained[::-1].index(True)
        head = int(encoded.input_ids[:1] == [self.encoder.tokenizer.bos_token_id])
        prompt, [reply] = fit(encoded.input_ids[:start], [encoded.input_ids[start:end]], self.room, head=head)
        return prompt, reply


def load_reward(run: Path, *, base: PreTrainedModel | None = None) -> RewardModel:
    """Open a finished run of stage ``reward``.

    Args:
        run: the run's folder.
        base: the run's base in memory, a causal model without an adapter, whose weights serve; else it is
            loaded. A run that tuned the whole model brings its own weights in either case.

    Raises:
        UserError: the folder is no finished run of a reward model.
    """
    record = finished_record(run)
    load: dict[str, Any] = record["load"]
    if "heads" not in load:
        found, expected = f"a run of stage {record['stage']}", "a run of stage reward"
        raise UserError(Problem(str(run), found, expected, f"`llm-align chat {run}` talks to this one"))
    rules = saved_rules(run, [RuleSettings(**rule) for rule in load["rules"]])
    model = _model(run, load, base)
    folder = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    reach = load["max_length"] + load["virtual_tokens"]
    separate = bool(why_separate(model.config, reach=reach))
    zeros = record["normalisation"]
    return RewardModel(
        model,
        Encoder(tokenizer, load["template"], system=load["system"], wish=load.get("wish", "")),
        zeros={name: (zeros[name]["mean"], zeros[name]["deviation"]) for name in load["heads"]},
        rules=rules,
        room=Room(load["max_length"], load["max_prompt_length"]),
        collate=RewardCollator(load["pad_id"], separate=separate, cost=cost_of(model)),
        tokens=TOKENS_PER_FORWARD[detect().device],
    )


def _model(run: Path, load: Mapping[str, Any], shared: PreTrainedModel | None) -> nn.Module:
    """Return base, adapter and heads, or the model that was tuned as a whole."""
    settings, whole = ModelSettings(**load["model"]), run / "model"
    heads, pad, precision = load["heads"], load["pad_id"], load["precision"]
    if shared is not None and not whole.is_dir():
        scorer: nn.Module = open_adapter(scorer_on(shared, heads, pad_id=pad), run / "adapter")
        return scorer.eval()
    if whole.is_dir():  # its weights were trained in float32
        settings = settings.model_copy(update={"base": str(whole), "revision": None, "rope": None})
        precision = "float32"
    base = load_scorer(
        settings,
        heads,
        precision=precision,
        quantization=load["quantization"],
        hardware=detect(),
        pad_id=pad,
    )
    model: nn.Module = base if whole.is_dir() else open_adapter(base, run / "adapter")
    return model.eval()


def _turns(prompt: Prompt) -> list[Message]:
    return question({"prompt": prompt}, "prompt") if isinstance(prompt, str) else list(prompt)


def _few(completions: list[Ids]) -> Iterator[list[Ids]]:
    """Yield so many completions that attention over all of them stays cheap."""
    for start in range(0, len(completions), TOGETHER):
        yield completions[start : start + TOGETHER]


def _group(prompt: Ids, completions: Sequence[Ids]) -> TokenizedGroup:
    count = len(completions)
    return TokenizedGroup(
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        completion_ids=tuple(np.asarray(ids, dtype=np.int32) for ids in completions),
        scores=np.full(count, nan),
        ranks=np.zeros(count, dtype=np.int32),
        margin=nan,
        row=0,
        place="",
        source=0,
    )
