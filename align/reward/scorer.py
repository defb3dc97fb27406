"""Load a finished reward model and score completions: per head, per rule, and in total."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from align.preference.attention import block_mask_unsupported, forward_cost
from align.preference.rows.dataset import TokenizedGroup
from align.preference.rows.encode import LengthLimits, truncate_to
from align.preference.rows.fields import prompt_turns
from align.reward.batch import RewardCollator, score_groups
from align.reward.function_reward import FunctionReward, load_rules
from align.reward.model import load_scorer
from align.reward.settings import RuleSettings
from align.reward.shared_base import scorer_sharing_base
from data_templates.segments import Message, TemplateError
from finetune.adapters._load import load_saved_adapter
from finetune.data.tokens import Encoder
from finetune.distributed.hardware import detect_hardware
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import read_finished_record
from finetune.recipe.settings import ModelSettings
from finetune.recipe.terminal import command_line
from finetune.recipe.user_arguments import completion_row
from finetune.training.auto_values import TOKENS_PER_FORWARD

PromptInput = str | Sequence[Message]
TokenIdList = list[int]
MAX_SHARED_COMPLETIONS = 16
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
    normalization: Mapping[str, tuple[float, float]]
    rules: Sequence[FunctionReward]
    length_limits: LengthLimits
    collator: RewardCollator
    tokens_per_forward: int

    @property
    def names(self) -> list[str]:
        """Return the names of all rewards: heads, rules and the total."""
        return [*self.normalization, *(rule.name for rule in self.rules), TOTAL]

    def score(self, prompts: Sequence[PromptInput], completions: Sequence[str]) -> dict[str, list[float]]:
        """Score completions of prompts; consecutive completions of one prompt share a forward pass.

        Args:
            prompts: one per completion: a string (or an HH dialogue), or messages.
            completions: the texts to score.

        Returns:
            Raw scores by head name, rule scores by rule name, and ``total``.

        Raises:
            UserError: the template cannot render a conversation, or a rule fails.
        """
        conversations = [
            [*_as_messages(prompt), Message("assistant", text)]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        locations = [f"completion {number}" for number in range(1, len(conversations) + 1)]
        return self.score_conversations(conversations, locations)

    def score_conversations(
        self, conversations: Sequence[Sequence[Message]], locations: Sequence[str]
    ) -> dict[str, list[float]]:
        """Score the last reply of each conversation, as ``score`` does.

        Args:
            conversations: conversations that end with a reply.
            locations: location of each conversation, for error messages.
        """
        if not conversations:
            return {name: [] for name in self.names}
        head_scores = self._head_scores(conversations, locations)
        scores = {name: head_scores[:, index].tolist() for index, name in enumerate(self.normalization)}
        total = sum(np.asarray(values) for values in self.normalized(scores).values())
        rows = [
            completion_row(conversation, location)
            for conversation, location in zip(conversations, locations, strict=True)
        ]
        for rule in self.rules:
            scores[rule.name] = rule.scores(rows)
            total = total + rule.weight * np.asarray(scores[rule.name])
        return {**scores, TOTAL: np.asarray(total).tolist()}

    def normalized(self, scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Normalize the heads' scores to mean 0 and std 1 over chosen training completions."""
        return {
            name: ((np.asarray(scores[name]) - mean) / std).tolist()
            for name, (mean, std) in self.normalization.items()
        }

    def _head_scores(
        self, conversations: Sequence[Sequence[Message]], locations: Sequence[str]
    ) -> np.ndarray:
        """Return raw scores (C, heads); consecutive conversations with one prompt are scored as a group."""
        pairs = [
            self._encode(conversation, location)
            for conversation, location in zip(conversations, locations, strict=True)
        ]
        groups = [
            _to_group(prompt, chunk)
            for prompt, same_prompt in groupby(pairs, key=lambda pair: pair[0])
            for chunk in _chunks([ids for _, ids in same_prompt])
        ]
        # An upper bound: rows are padded to the longest one of their batch.
        longest = max(len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups)
        return score_groups(
            self.model, groups, self.collator, batch_size=max(1, self.tokens_per_forward // longest)
        )

    def _encode(self, conversation: Sequence[Message], location: str) -> tuple[TokenIdList, TokenIdList]:
        """Return the token ids of prompt and reply, truncated as in training."""
        try:
            before = [replace(turn, trained=False) for turn in conversation[:-1]]
            encoded = self.encoder.encode([*before, conversation[-1]])
        except TemplateError as error:
            actual = f"template '{self.encoder.name}' cannot render it: {error}"
            raise UserError(Problem(location, actual, "turns that the template supports")) from error
        if True not in encoded.loss_mask:
            raise UserError(Problem(location, "the reply has no tokens", "a non-empty reply"))
        # From the first to the last trained token, as in training: what the template adds after is not
        # scored.
        start = encoded.loss_mask.index(True)
        end = len(encoded.loss_mask) - encoded.loss_mask[::-1].index(True)
        # Truncation from the left keeps BOS.
        num_bos = int(encoded.input_ids[:1] == [self.encoder.tokenizer.bos_token_id])
        prompt, [reply] = truncate_to(
            encoded.input_ids[:start],
            [encoded.input_ids[start:end]],
            self.length_limits,
            num_kept_start=num_bos,
        )
        return prompt, reply


def load_reward_model(run: Path, *, base: PreTrainedModel | None = None) -> RewardModel:
    """Load the reward model of a finished run of stage ``reward``.

    Args:
        run: the run's folder.
        base: the base in memory, a causal model without an adapter, to share weights with; None loads it.
            A fully fine-tuned run always loads its own weights.

    Raises:
        UserError: not the folder of a finished reward model run.
    """
    record = read_finished_record(run)
    saved: dict[str, Any] = record["reload"]
    if "heads" not in saved:
        actual, expected = f"a run of stage {record['stage']}", "a run of stage reward"
        raise UserError(
            Problem(
                str(run), actual, expected, f"`{command_line('chat', run)}` for a model that generates text"
            )
        )
    rules = load_rules(run, [RuleSettings(**rule) for rule in saved["rules"]])
    model = _load_model(run, saved, base)
    folder = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    max_positions = saved["max_length"] + saved["virtual_tokens"]
    one_per_row = bool(block_mask_unsupported(model.config, max_positions=max_positions))
    normalization = record["reward_normalization"]
    return RewardModel(
        model,
        Encoder(
            tokenizer,
            saved["template"],
            system=saved["system_prompt"],
            control_suffix=saved["control_suffix"],
            template_options=saved.get("template_options"),
        ),
        normalization={
            name: (normalization[name]["mean"], normalization[name]["std"]) for name in saved["heads"]
        },
        rules=rules,
        length_limits=LengthLimits(saved["max_length"], saved["max_prompt_length"]),
        collator=RewardCollator(saved["pad_id"], one_per_row=one_per_row, cost=forward_cost(model)),
        tokens_per_forward=TOKENS_PER_FORWARD[detect_hardware().device],
    )


def _load_model(run: Path, saved: Mapping[str, Any], shared_base: PreTrainedModel | None) -> nn.Module:
    """Load base, adapter and heads, or the fully fine-tuned model."""
    settings, full_model = ModelSettings(**saved["model"]), run / "model"
    heads, pad_id, precision = saved["heads"], saved["pad_id"], saved["precision"]
    if shared_base is not None and not full_model.is_dir():
        scorer: nn.Module = load_saved_adapter(
            scorer_sharing_base(shared_base, heads, pad_id=pad_id), run / "adapter"
        )
        return scorer.eval()
    if full_model.is_dir():  # its weights were trained in float32
        settings = settings.model_copy(update={"base": str(full_model), "revision": None, "rope": None})
        precision = "float32"
    base = load_scorer(
        settings,
        heads,
        precision=precision,
        quantization=saved["quantization"],
        hardware=detect_hardware(),
        pad_id=pad_id,
    )
    model: nn.Module = base if full_model.is_dir() else load_saved_adapter(base, run / "adapter")
    return model.eval()


def _as_messages(prompt: PromptInput) -> list[Message]:
    return prompt_turns({"prompt": prompt}, "prompt") if isinstance(prompt, str) else list(prompt)


def _chunks(completions: list[TokenIdList]) -> Iterator[list[TokenIdList]]:
    """Yield chunks of at most MAX_SHARED_COMPLETIONS completions."""
    for start in range(0, len(completions), MAX_SHARED_COMPLETIONS):
        yield completions[start : start + MAX_SHARED_COMPLETIONS]


def _to_group(prompt: TokenIdList, completions: Sequence[TokenIdList]) -> TokenizedGroup:
    count = len(completions)
    # The collator takes labels, which nothing reads when completions are only scored.
    return TokenizedGroup(
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        completion_ids=tuple(np.asarray(ids, dtype=np.int32) for ids in completions),
        scores=np.full(count, nan),
        ranks=np.zeros(count, dtype=np.int32),
        margin=nan,
        row=0,
        location="",
        source=0,
    )
