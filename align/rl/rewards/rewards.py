"""Score completions with reward models and reward functions, and combine the scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.reward.rules import Rule
from align.reward.scorer import TOTAL, RewardModel
from align.rl.rewards.combining import Numbers, length_cost, piecewise, weighted_sum
from align.rl.rewards.settings import HELPFULNESS, LENGTH, SAFETY, RewardsSettings
from data_templates._segments import Message
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_function import number_from
from finetune.training.preflight.ticks import Tick
from finetune.training.samples import question_of, spread
from finetune.training.stops import NotFiniteError

Talks = Sequence[Sequence[Message]]
TRIED = 8
"""Number of prompts of the reward check before sampling starts."""
ANSWERED = "a reference answer in each row, as in question/answer data"


@dataclass(frozen=True)
class Judged:
    """Scores of C completions: ``total`` (C,) is maximized, ``by_source`` has each reward by name, (C,)."""

    total: Numbers
    parts: dict[str, Numbers]


@dataclass(frozen=True)
class Learnt:
    """A reward from a reward model: index of the loaded model, and name of the score (a head, a rule, total).

    A head's score has mean 0 and standard deviation 1 over the chosen completions of its training rows.
    """

    name: str
    weight: float
    model: int
    score: str


@dataclass(frozen=True)
class AnswerRule:
    """A reward function that also takes the row's reference answer."""

    name: str
    weight: float
    function: Callable[[str, str, str], Any]

    def scores(
        self,
        prompts: Sequence[str],
        replies: Sequence[str],
        places: Sequence[str],
        expected: Sequence[str | None],
    ) -> list[float]:
        """Return the score of each completion.

        Raises:
            UserError: a row has no reference answer, or the function raised or did not return a number.
        """
        rows = zip(prompts, replies, places, expected, strict=True)
        return [self._score(*row) for row in rows]

    def _score(self, prompt: str, reply: str, place: str, right: str | None) -> float:
        where, function = f"reward '{self.name}' on {place}", self.function
        if right is None:
            raise UserError(Problem(where, "the row has no reference answer", ANSWERED))
        return number_from(lambda asked, said: function(asked, said, right), prompt, reply, where=where)


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
    """

    settings: RewardsSettings
    sources: Sequence[Learnt | Rule | AnswerRule]
    models: Sequence[RewardModel]
    risky: Callable[[str], Any] | None
    tokenizer: PreTrainedTokenizerBase
    notes: list[str]

    @property
    def names(self) -> list[str]:
        """Return the names of the rewards, including the length penalty."""
        own = [source.name for source in self.sources]
        return [*own, LENGTH] if self.settings.length_penalty else own

    def refuse_unanswered(self, expected: Sequence[str | None], places: Sequence[str]) -> None:
        """Raise UserError if a reward function needs reference answers that some rows lack."""
        rules = [source.name for source in self.sources if isinstance(source, AnswerRule)]
        without = [place for place, right in zip(places, expected, strict=True) if right is None]
        if rules and without:
            found = f"{len(without)} of {len(places)} rows have no reference answer (first: {without[0]})"
            raise UserError(Problem(f"reward '{rules[0]}'", found, ANSWERED))

    def judge(
        self, talks: Talks, places: Sequence[str], *, expected: Sequence[str | None] | None = None
    ) -> Judged:
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
        if not talks:
            return Judged(np.zeros(0), {name: np.zeros(0) for name in self.names})
        prompts, replies = [question_of(talk) for talk in talks], [talk[-1].content for talk in talks]
        # Each model runs once, however many of its scores are rewards.
        scores = [_scores(model, talks, places) for model in self.models]
        parts: dict[str, Numbers] = {}
        for source in self.sources:
            if isinstance(source, Learnt):
                parts[source.name] = scores[source.model][source.score]
            elif isinstance(source, AnswerRule):
                known = [None] * len(talks) if expected is None else expected
                parts[source.name] = np.asarray(source.scores(prompts, replies, places, known))
            else:
                parts[source.name] = np.asarray(source.scores(prompts, replies, places))
        total = self._combined(parts, prompts)
        # After the combination, so that it applies to both kinds.
        if self.settings.length_penalty:
            parts[LENGTH] = self._length_cost(replies)
            total = total + parts[LENGTH]
        _refuse_no_number(parts, places)
        return Judged(total, parts)

    def tick(
        self, prompts: Talks, places: Sequence[str], *, expected: Sequence[str | None] | None = None
    ) -> Tick:
        """Check the rewards on empty replies to some prompts: a policy may sample EOS at once.

        Args:
            prompts: conversations that end with a user turn.
            locations: location of each one, for messages.
            expected: reference answers, for functions that take them.

        Raises:
            UserError: a reward function fails, or the template rejects a conversation.
            NotFiniteError: a reward model returns NaN or infinity.
        """
        some = spread(len(prompts), TRIED)
        talks = [[*prompts[index], Message("assistant", "")] for index in some]
        known = None if expected is None else [expected[index] for index in some]
        worth = self.judge(talks, [places[index] for index in some], expected=known).total
        named = ", ".join(source.name for source in self.sources)
        said = f"empty replies to {len(some)} prompts score {worth.min():.3g} to {worth.max():.3g}"
        return Tick("rewards", f"{named}: {said}")

    def _combined(self, parts: Mapping[str, Numbers], prompts: Sequence[str]) -> Numbers:
        if self.settings.combine == "sum":
            return weighted_sum(parts, {source.name: source.weight for source in self.sources})
        # Once per distinct prompt: a user function may be slow, and a prompt has several completions.
        asked = {prompt: self._is_risky(prompt) for prompt in dict.fromkeys(prompts)}
        risky = [asked[prompt] for prompt in prompts]
        return piecewise(parts[HELPFULNESS], parts[SAFETY], risky, below=self.settings.risky_below)

    def _is_risky(self, prompt: str) -> bool:
        risky = self.risky
        if risky is None:
            return False
        return bool(number_from(lambda text, _: risky(text), prompt, "", where="reward.risky"))

    def _length_cost(self, replies: Sequence[str]) -> Numbers:
        ids: list[list[int]] = self.tokenizer(list(replies), add_special_tokens=False)["input_ids"]
        per_token, free = self.settings.length_penalty, self.settings.length_free
        return length_cost([len(one) for one in ids], per_token=per_token, free=free)


def _scores(model: RewardModel, talks: Talks, places: Sequence[str]) -> dict[str, Numbers]:
    """Return all scores of a reward model; scores of heads and their total are normalized."""
    raw = model.score_talks(talks, places)
    found = {**raw, **model.normalised(raw), TOTAL: raw[TOTAL]}
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}


def _refuse_no_number(parts: Mapping[str, Numbers], places: Sequence[str]) -> None:
    """Raise NotFiniteError for the first reward that is NaN or infinite."""
    for name, values in parts.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            raise NotFiniteError(f"reward '{name}' is {values[wrong[0]]} on {places[wrong[0]]}")
