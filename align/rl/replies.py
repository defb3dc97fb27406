"""Replies that a policy has drawn, in words, with what the rewards say of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.rl.prompts import PreparedPrompts, Prompt
from align.rl.rewards.rewards import Judged, Rewards
from align.rl.rollout import Completion
from data_templates._segments import Message
from finetune.data.tokens import Encoder
from finetune.training.preflight.ticks import Tick


@dataclass(frozen=True)
class Replies:
    """Sampled completions with what the rewards say of them."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    texts: Sequence[str]
    judged: Judged

    @property
    def lengths(self) -> Tensor:
        """Return the tokens of each completion: (episodes,)."""
        return torch.tensor([len(one.ids) for one in self.completions])

    @property
    def stopped(self) -> Tensor:
        """Return which completions ended by themselves: (episodes,)."""
        return torch.tensor([one.stopped for one in self.completions])

    @property
    def rewards(self) -> Tensor:
        """Return the rewards that are maximised: (episodes,), float32."""
        return torch.from_numpy(np.asarray(self.judged.total)).float()


def judged_replies(
    prompts: Sequence[Prompt], completions: Sequence[Completion], rewards: Rewards, encoder: Encoder
) -> Replies:
    """Return completions in words, judged; neighbours with the same prompt are read together.

    Raises:
        UserError: a reward raised something or gave no number.
    """
    texts = [encoder.decode_reply(list(one.ids)) for one in completions]
    talks = [[*row.talk, Message("assistant", text)] for row, text in zip(prompts, texts, strict=True)]
    known = [row.expected for row in prompts]
    judged = rewards.judge(talks, [row.place for row in prompts], expected=known)
    return Replies(prompts, completions, texts, judged)


def try_rewards(rewards: Rewards, data: PreparedPrompts) -> Tick:
    """Try the rewards on the recipe's prompts before anything is drawn or written.

    Raises:
        UserError: a program fails, or it needs replies of the rows' own and some rows have none.
        NotFiniteError: a reward model gives NaN or infinity.
    """
    for prompts in filter(None, (data.train, data.held_out)):
        rewards.refuse_unanswered([prompt.expected for prompt in prompts], prompts.places)
    known = [row.expected for row in data.train]
    return rewards.tick([row.talk for row in data.train], data.train.places, expected=known)
