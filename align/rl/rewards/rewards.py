"""Score completions with reward models and reward functions, and combine the scores.

A weighted sum, Llama 2's piecewise reward, and a length penalty.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.reward.function_reward import FunctionReward
from align.reward.scorer import TOTAL, RewardModel
from align.rl.rewards.settings import HELPFULNESS, LENGTH_PENALTY, SAFETY, RewardsSettings
from data_templates.segments import Message
from finetune.distributed.interrupts import NotFiniteError
from finetune.recipe.errors import UserError
from finetune.recipe.user_arguments import (
    ColumnsByLocation,
    CompletionRow,
    completion_row,
    missing_value_problems,
)
from finetune.recipe.user_function import call_for_number
from finetune.training.preflight.checks import CheckResult
from finetune.training.samples import evenly_spaced

Scores = np.ndarray
"""One number per completion: (C,) float64."""

Conversations = Sequence[Sequence[Message]]
NUM_CHECKED_PROMPTS = 8
"""Number of prompts of the reward check before sampling starts."""


@dataclass(frozen=True)
class RewardScores:
    """Scores of C completions: ``total`` (C,) is maximized, ``by_source`` has each reward by name, (C,)."""

    total: Scores
    by_source: dict[str, Scores]


@dataclass(frozen=True)
class ModelReward:
    """A reward from a reward model: index of the loaded model, and name of the score (a head, a rule, total).

    A head's score has mean 0 and standard deviation 1 over the chosen completions of its training rows.
    """

    name: str
    weight: float
    model_index: int
    score_name: str


@dataclass(frozen=True)
class Rewards:
    """All rewards of a recipe.

    Attributes:
        settings: how to combine them.
        sources: the rewards, in the recipe's order.
        models: loaded reward models; several sources may be scores of the same model.
        unsafe_prompt_fn: user function (prompt) -> bool; None if the recipe has none.
        tokenizer: counts tokens for the length penalty.
        notes: messages for the log.
        columns: columns of the rows by location, for functions that take them.
    """

    settings: RewardsSettings
    sources: Sequence[ModelReward | FunctionReward]
    models: Sequence[RewardModel]
    unsafe_prompt_fn: Callable[..., Any] | None
    tokenizer: PreTrainedTokenizerBase
    notes: list[str]
    columns: ColumnsByLocation = field(default_factory=dict)

    @property
    def functions(self) -> list[FunctionReward]:
        """Return the rewards that are functions."""
        return [source for source in self.sources if isinstance(source, FunctionReward)]

    @property
    def names(self) -> list[str]:
        """Return the names of the rewards, including the length penalty."""
        names = [source.name for source in self.sources]
        return [*names, LENGTH_PENALTY] if self.settings.length_penalty else names

    def check_values(self, expected: Sequence[str | None], locations: Sequence[str]) -> None:
        """Raise UserError if a reward function has parameters that nothing fills in some rows."""
        rows = [
            CompletionRow("", "", answer, location, self.columns)
            for answer, location in zip(expected, locations, strict=True)
        ]
        problems = [
            problem
            for source in self.functions
            for problem in missing_value_problems(source.function, rows, where=f"reward '{source.name}'")
        ]
        if problems:
            raise UserError(problems)

    def score(
        self,
        conversations: Conversations,
        locations: Sequence[str],
        *,
        expected: Sequence[str | None] | None = None,
    ) -> RewardScores:
        """Score the last reply of each conversation; an empty reply is scored as an immediate EOS.

        Reward models encode the prompt once for consecutive conversations with the same prompt.

        Args:
            conversations: conversations that end with the assistant's reply.
            locations: location of each one, for messages.
            expected: reference answers, for functions that take them.

        Raises:
            UserError: a reward function failed, or the template rejects a conversation.
            NotFiniteError: a reward model returned NaN or infinity.
        """
        # A process may have no completion in its shard.
        if not conversations:
            return RewardScores(np.zeros(0), {name: np.zeros(0) for name in self.names})
        answers = [None] * len(conversations) if expected is None else expected
        rows = [
            completion_row(conversation, location, reference=answer, columns=self.columns)
            for conversation, location, answer in zip(conversations, locations, answers, strict=True)
        ]
        # Each model runs once, however many of its scores are rewards.
        model_scores = [_model_scores(model, conversations, locations) for model in self.models]
        by_source: dict[str, Scores] = {}
        for source in self.sources:
            if isinstance(source, ModelReward):
                by_source[source.name] = model_scores[source.model_index][source.score_name]
            else:
                by_source[source.name] = np.asarray(source.scores(rows))
        total = self._combine(by_source, [row.prompt for row in rows])
        # After the combination, so that it applies to both kinds.
        if self.settings.length_penalty:
            by_source[LENGTH_PENALTY] = self._length_penalty([row.completion for row in rows])
            total = total + by_source[LENGTH_PENALTY]
        _raise_if_not_finite(by_source, locations)
        return RewardScores(total, by_source)

    def check(
        self,
        prompts: Conversations,
        locations: Sequence[str],
        *,
        expected: Sequence[str | None] | None = None,
    ) -> CheckResult:
        """Check that every reward scores empty completions of some prompts: a policy may sample EOS at once.

        Args:
            prompts: conversations that end with a user turn.
            locations: location of each one, for messages.
            expected: reference answers, for functions that take them.

        Raises:
            UserError: a reward function fails, or the template rejects a conversation.
            NotFiniteError: a reward model returns NaN or infinity.
        """
        # Evenly spaced, since a file often has its kinds of prompts one after the other.
        indices = evenly_spaced(len(prompts), NUM_CHECKED_PROMPTS)
        conversations = [[*prompts[index], Message("assistant", "")] for index in indices]
        answers = None if expected is None else [expected[index] for index in indices]
        totals = self.score(conversations, [locations[index] for index in indices], expected=answers).total
        names = ", ".join(source.name for source in self.sources)
        scores = f"{totals.min():.3g} to {totals.max():.3g}"
        return CheckResult("rewards", f"{names}: empty completions of {len(indices)} prompts score {scores}")

    def _combine(self, by_source: Mapping[str, Scores], prompts: Sequence[str]) -> Scores:
        if self.settings.combine == "sum":
            return weighted_sum(by_source, {source.name: source.weight for source in self.sources})
        # Once per distinct prompt: a user function may be slow, and a prompt has several completions.
        is_unsafe = {prompt: self._is_unsafe_prompt(prompt) for prompt in dict.fromkeys(prompts)}
        unsafe = [is_unsafe[prompt] for prompt in prompts]
        return piecewise(
            by_source[HELPFULNESS], by_source[SAFETY], unsafe, safety_threshold=self.settings.safety_threshold
        )

    def _is_unsafe_prompt(self, prompt: str) -> bool:
        unsafe_prompt_fn = self.unsafe_prompt_fn
        if unsafe_prompt_fn is None:
            return False
        # `call_for_number` passes prompt and completion; this function takes the prompt alone.
        return bool(
            call_for_number(
                lambda text, _: unsafe_prompt_fn(prompt=text), prompt, "", where="rewards.unsafe_prompt_fn"
            )
        )

    def _length_penalty(self, completions: Sequence[str]) -> Scores:
        # Of the text alone: neither EOS nor BOS is penalized.
        ids: list[list[int]] = self.tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        per_token, free_tokens = self.settings.length_penalty, self.settings.length_free
        return length_penalty(
            [len(token_ids) for token_ids in ids], per_token=per_token, free_tokens=free_tokens
        )


def _model_scores(
    model: RewardModel, conversations: Conversations, locations: Sequence[str]
) -> dict[str, Scores]:
    """Return all scores of a reward model; scores of heads and their total are normalized."""
    raw = model.score_conversations(conversations, locations)
    # The total needs no normalization: it is a sum of normalized heads and weighted rules.
    scores = {**raw, **model.normalized(raw), TOTAL: raw[TOTAL]}
    return {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}


def _raise_if_not_finite(by_source: Mapping[str, Scores], locations: Sequence[str]) -> None:
    """Raise NotFiniteError for the first reward that is NaN or infinite."""
    for name, values in by_source.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise NotFiniteError(f"reward '{name}' is {values[bad[0]]} on {locations[bad[0]]}")


def weighted_sum(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Return r = sum_i w_i r_i (Glaese et al. 2022, arXiv 2209.14375, section 2.6: preferences and rules).

    Args:
        scores: (C,) of each reward.
        weights: weight of each reward.
    """
    return np.asarray(sum(weights[name] * values for name, values in scores.items()))


def piecewise(
    helpfulness: Scores, safety: Scores, unsafe: Sequence[bool], *, safety_threshold: float
) -> Scores:
    """Return Llama 2's piecewise reward before whitening (arXiv 2307.09288, section 3.2.3).

    R_c = R_s if the prompt is unsafe or s(R_s) < 0.15, else R_h; s is the sigmoid. The paper's R are
    probabilities and it takes their logit at the end; here they stay logits.

    Args:
        helpfulness: (C,) scores.
        safety: (C,) scores.
        unsafe: (C,) whether each prompt may elicit unsafe replies.
        safety_threshold: in probability, 0.15 in the paper.
    """
    logit_threshold = np.log(safety_threshold / (1 - safety_threshold))  # s(x) < threshold, on logits
    return np.where(np.asarray(unsafe, dtype=bool) | (safety < logit_threshold), safety, helpfulness)


def length_penalty(lengths: Sequence[int], *, per_token: float, free_tokens: int) -> Scores:
    """Return the length penalty of tokens beyond ``free_tokens``: (C,), 0 or below."""
    excess: Scores = np.maximum(np.asarray(lengths, dtype=np.float64) - free_tokens, 0.0)
    return -per_token * excess
