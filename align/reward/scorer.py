"""Load a finished reward model and score completions: per head, per rule, and in total."""

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
"""Maximum completions that share one prompt: attention costs the square of the row's length."""
TOTAL = "total"
"""Name of the total reward: sum of all heads, normalized to mean 0 and std 1, and of the weighted rules."""


@dataclass(frozen=True)
class RewardModel:
    """Base, adapter and heads of a finished run, with its rules.

    Attributes:
        model: the sequence classification model.
        encoder: converts conversations to tokens.
        normalization: mean and standard deviation of each head over chosen completions of its training rows.
        rules: rule rewards.
        length_limits: length limits of a prompt with its completion.
        collator: the collator.
        tokens_per_forward: approximate tokens per forward pass.
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
        """Return the names of all rewards: heads, rules and the total."""
        return [*self.zeros, *(rule.name for rule in self.rules), TOTAL]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, list[float]]:
        """Score completions of prompts; consecutive completions of one prompt share its forward pass.

        Args:
            prompts: one per completion: a text (also an HH dialogue), or messages.
            completions: the texts to score.

        Returns:
            Raw scores by head name, rule scores by rule name, and ``total``.

        Raises:
            UserError: the template cannot render a conversation, or a rule fails.
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
        """Score the last reply of each conversation, as ``score`` does.

        Args:
            conversations: conversations that end with a reply.
            locations: location of each conversation, for error messages.
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
        """Normalize the heads' scores to mean 0 and std 1 over chosen training completions."""
        return {
            name: ((np.asarray(scores[name]) - mean) / deviation).tolist()
            for name, (mean, deviation) in self.zeros.items()
        }

    def _heads(self, talks: Sequence[Sequence[Message]], places: Sequence[str]) -> np.ndarray:
        """Return raw scores (C, heads); consecutive conversations with one prompt are scored as a group."""
        pairs = [self._encoded(talk, place) for talk, place in zip(talks, places, strict=True)]
        groups = [
            _group(prompt, part)
            for prompt, own in groupby(pairs, key=lambda pair: pair[0])
            for part in _few([ids for _, ids in own])
        ]
        longest = max(len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups)
        return score_groups(self.model, groups, self.collate, size=max(1, self.tokens // longest))

    def _encoded(self, talk: Sequence[Message], place: str) -> tuple[Ids, Ids]:
        """Return the token ids of prompt and reply, truncated as in training."""
        try:
            encoded = self.encoder.encode(talk)
        except TemplateError as error:
            found = f"template '{self.encoder.name}' cannot render it: {error}"
            raise UserError(Problem(place, found, "turns that the template supports")) from error
        if True not in encoded.trained:
            raise UserError(Problem(place, "the reply has no tokens", "a non-empty reply"))
        start = encoded.trained.index(True)
        end = len(encoded.trained) - encoded.trained[::-1].index(True)
        head = int(encoded.input_ids[:1] == [self.encoder.tokenizer.bos_token_id])
        prompt, [reply] = fit(encoded.input_ids[:start], [encoded.input_ids[start:end]], self.room, head=head)
        return prompt, reply


def load_reward(run: Path, *, base: PreTrainedModel | None = None) -> RewardModel:
    """Load the reward model of a finished run of stage ``reward``.

    Args:
        run: the run's folder.
        base: the base in memory, a causal model without an adapter, to share weights with; None loads it.
            A fully fine-tuned run always loads its own weights.

    Raises:
        UserError: not the folder of a finished reward model run.
    """
    record = finished_record(run)
    load: dict[str, Any] = record["load"]
    if "heads" not in load:
        found, expected = f"a run of stage {record['stage']}", "a run of stage reward"
        raise UserError(
            Problem(str(run), found, expected, f"`llm-align chat {run}` for a model that generates text")
        )
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
    """Load base, adapter and heads, or the fully fine-tuned model."""
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
    """Yield chunks of at most MAX_SHARED_COMPLETIONS completions."""
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
