"""Sampled completions with their text and reward scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from align.rl.prompts import PreparedPrompts, Prompt
from align.rl.rewards.rewards import Judged, Rewards
from align.rl.rollout import Completion
from data_templates._segments import Message
from finetune.data.tokens import Encoder
from finetune.training.preflight.ticks import Tick
from finetune.training.processes import everyones, share, together


@dataclass(frozen=True)
class Replies:
    """C sampled completions with prompts, texts and reward scores."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    texts: Sequence[str]
    judged: Judged

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each completion: (C,)."""
        return torch.tensor([len(one.ids) for one in self.completions])

    @property
    def stopped(self) -> Tensor:
        """Return which completions ended with EOS: (C,) bool."""
        return torch.tensor([one.stopped for one in self.completions])

    @property
    def rewards(self) -> Tensor:
        """Return the total rewards, which are maximized: (C,) float32."""
        return torch.from_numpy(np.asarray(self.judged.total)).float()


def judged_replies(
    prompts: Sequence[Prompt], completions: Sequence[Completion], rewards: Rewards, encoder: Encoder
) -> Replies:
    """Decode completions and score them; each process scores a shard, and all get all scores.

    Raises:
        UserError: a reward function raised or did not return a number.
    """
    texts = [encoder.decode_reply(list(one.ids)) for one in completions]
    talks = [[*row.talk, Message("assistant", text)] for row, text in zip(prompts, texts, strict=True)]
    # Shard by runs of equal prompts: a reward model encodes a prompt once for its consecutive completions.
    runs = [list(run) for _, run in groupby(range(len(prompts)), key=lambda index: prompts[index].ids)]
    # Each process scores a shard, and the order is restored afterwards.
    own = [index for run in share(runs) for index in run]
    judged = rewards.judge(
        [talks[index] for index in own],
        [prompts[index].place for index in own],
        expected=[prompts[index].expected for index in own],
    )
    return Replies(prompts, completions, texts, _of_all(judged, [len(run) for run in share(runs)]))


def _of_all(judged: Judged, sizes: Sequence[int]) -> Judged:
    """All-gather reward scores; ``group_sizes`` are the numbers of completions in this process's runs."""
    names = list(judged.parts)
    table = np.stack([judged.total, *judged.parts.values()])
    runs = np.split(table, np.cumsum(sizes, dtype=int), axis=1)[:-1]
    total, *parts = np.concatenate(together(everyones(runs)), axis=1)
    return Judged(total, dict(zip(names, parts, strict=True)))


def try_rewards(rewards: Rewards, data: PreparedPrompts) -> Tick:
    """Check the rewards on the recipe's prompts before anything is sampled or written.

    Raises:
        UserError: a reward function fails, or needs reference answers that some rows lack.
        NotFiniteError: a reward model returns NaN or infinity.
    """
    for prompts in filter(None, (data.train, data.held_out)):
        rewards.refuse_unanswered([prompt.expected for prompt in prompts], prompts.places)
    known = [row.expected for row in data.train]
    return rewards.tick([row.talk for row in data.train], data.train.places, expected=known)
