"""Experience: the policy answers prompts, the answers are judged, and every token gets its advantage."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from align.ppo.episodes import Episodes, Tables
from align.ppo.roles import Roles
from align.ppo.settings import PpoSettings
from align.preference.starting_policy import StartingPolicy, arithmetic
from align.rl.maths import advantages, kl, masked, scores
from align.rl.prompts import Prompt, Prompts
from align.rl.reading import Said, lay_out, policy_tables, token_mask
from align.rl.replies import Replies, judged_replies
from align.rl.rewards.rewards import Rewards
from align.rl.rollout import Sampling, sample
from finetune.data.tokens import Encoder
from finetune.training.processes import everyones, share, share_in_step

Controller = kl.FixedKl | kl.AdaptiveKl
PROMPTS, CUT = 0, 1
"""What random streams are for: each draw has its own, so that none disturbs another."""


@dataclass
class Collector:
    """Policy, reference, value and rewards at work on prompts.

    Attributes:
        roles: policy and value.
        start: the policy as it started: the reference.
        rewards: what is maximised.
        encoder: turns completions into text.
        sampling: how completions are drawn.
        precision: of forward passes.
        size: completions of a forward pass.
        seconds: what each kind of work took since it was last asked for.
    """

    roles: Roles
    start: StartingPolicy
    rewards: Rewards
    encoder: Encoder
    sampling: Sampling
    precision: str
    size: int
    seconds: dict[str, float] = field(default_factory=dict)

    def answer(self, prompts: Sequence[Prompt], *, seed: int) -> Replies:
        """Return a sampled and judged reply to each prompt.

        Raises:
            UserError: a reward raised something or gave no number.
        """
        with self.timed("generation"):
            ids = [prompt.ids for prompt in prompts]
            completions = sample(self.roles.policy, ids, sampling=self.sampling, seed=seed)
        with self.timed("scoring"):
            return judged_replies(prompts, completions, self.rewards, self.encoder)

    @torch.no_grad()
    def read(self, replies: Replies, passes: Sequence[Sequence[int]]) -> Said:
        """Return what the models say of the replies' tokens; each process reads its share of the passes.

        Args:
            replies: what was sampled.
            passes: the numbers of the replies of each forward pass; every reply is in one of them. The passes
                of the first updates, in this order, make their ratios exactly 1.
        """
        longest, count = int(replies.lengths.max()), len(replies.completions)
        device, pad = next(self.roles.parameters()).device, self.sampling.stop_ids[0]
        names = ("logps", "reference_logps", "values", "entropies")
        tables = {name: torch.zeros(count, longest) for name in names}
        with self.timed("scoring"), arithmetic(self.roles.policy, self.precision):
            for part, _ in share_in_step(passes):
                ids = [replies.prompts[i].ids for i in part], [replies.completions[i].ids for i in part]
                laid = lay_out(*ids, pad_id=pad)
                batch = {name: value.to(device) for name, value in laid.items() if isinstance(value, Tensor)}
                logps, entropies, values, _ = self.roles(batch, spread=True)
                with self.start.in_place():
                    reference, _ = policy_tables(
                        self.roles.policy, batch, temperature=self.roles.temperature, spread=False
                    )
                for name, found in zip(names, (logps, reference, values, entropies), strict=True):
                    tables[name][list(part), : found.shape[1]] = found.float().cpu()
            return Said(**_of_all(tables, [index for part in share(passes) for index in part]))

    def passes(self, replies: Replies) -> list[list[int]]:
        """Return forward passes over all replies, those of similar length together."""
        order = np.argsort(-_lengths(replies), kind="stable").tolist()
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add what a block takes to the seconds of its kind of work."""
        start = time.monotonic()
        yield
        self.seconds[work] = self.seconds.get(work, 0.0) + time.monotonic() - start


def _of_all(tables: dict[str, Tensor], own: Sequence[int]) -> dict[str, Tensor]:
    """Return tables with the lines that every process has filled; ``own`` are this one's."""
    for lines, part in everyones((list(own), {name: table[own] for name, table in tables.items()})):
        for name, table in part.items():
            tables[name][lines] = table
    return tables


def rows_of_rollout(prompts: int, size: int, rollout: int, *, seed: int) -> list[int]:
    """Return the numbers of a rollout's prompts: all prompts in a new order again and again.

    >>> one, two = rows_of_rollout(4, 2, 0, seed=0), rows_of_rollout(4, 2, 1, seed=0)
    >>> sorted(one + two)
    [0, 1, 2, 3]
    """
    places = range(rollout * size, (rollout + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, PROMPTS, epoch]).permutation(prompts).tolist()
        for epoch in {place // prompts for place in places}
    }
    return [orders[place // prompts][place % prompts] for place in places]


def cut_updates(
    lengths: Sequence[int], *, batch_size: int, size: int, draw: Sequence[int]
) -> list[list[list[int]]]:
    """Cut a rollout into the optimizer steps of one epoch, and these into forward passes.

    Args:
        lengths: (episodes,) tokens of each with its prompt; a step's longest ones go through together.
        batch_size: episodes of an optimizer step; it divides their number.
        size: episodes of a forward pass.
        draw: seeds of the order.

    >>> cut_updates([3, 9, 4, 8], batch_size=4, size=2, draw=[0])
    [[[1, 3], [2, 0]]]
    """
    order = np.random.default_rng([CUT, *draw]).permutation(len(lengths))
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    longest_first = -np.asarray(lengths)
    by_length = [step[np.argsort(longest_first[step], kind="stable")].tolist() for step in steps]
    return [[step[start : start + size] for start in range(0, len(step), size)] for step in by_length]


def whole_lengths(replies: Replies) -> np.ndarray:
    """Return the tokens of each reply with its prompt: (episodes,)."""
    own: np.ndarray = np.array([len(prompt.ids) for prompt in replies.prompts]) + _lengths(replies)
    return own


def _lengths(replies: Replies) -> np.ndarray:
    return np.array([len(one.ids) for one in replies.completions])


def shaped_scores(replies: Replies, settings: PpoSettings, running: scores.Running) -> Tensor:
    """Return what PPO maximises of the rewards: (episodes,).

    Normalised, clipped, and replaced where a reply has no end, in this order.
    """
    found = replies.rewards
    if settings.normalise == "running":
        found = running.normalise(found, shift_mean=True)
    if settings.clip_scores is not None:
        found = scores.clip_scores(found, limit=settings.clip_scores)
    return scores.missing_end(found, replies.stopped, value=settings.missing_end)


def learnt_from(
    said: Said, found: Tensor, lengths: Tensor, *, coefficient: float, settings: PpoSettings
) -> Tables:
    """Return what is learnt: each token's advantage and return.

    Args:
        said: what the models say of the tokens.
        found: (episodes,) scores.
        lengths: (episodes,) tokens.
        coefficient: what a nat of distance costs.
        settings: discount, trace, estimator, whitening.
    """
    mask = token_mask(lengths, said.logps.shape[1])
    distance = kl.kl_terms(said.logps, said.reference_logps, estimator=settings.kl_estimator)
    rewards = advantages.token_rewards(distance, found, lengths, coefficient=coefficient)
    if settings.whiten_rewards:
        rewards = masked.whiten(rewards, mask, shift_mean=False)
    gained, returns = advantages.advantages(
        rewards, said.values, mask, discount=settings.discount, trace=settings.trace
    )
    if settings.whiten_advantages:
        gained = masked.whiten(gained, mask, shift_mean=True)
    return Tables(said.logps, said.reference_logps, said.values, gained, returns)


def episodes_of(rows: Sequence[int], replies: Replies, tables: Tables) -> Episodes:
    """Return a rollout as it is kept until it has been learnt from."""
    prompts = tuple(prompt.ids for prompt in replies.prompts)
    return Episodes(tuple(rows), prompts, tuple(one.ids for one in replies.completions), tables)


def select(prompts: Prompts, rows: Sequence[int]) -> list[Prompt]:
    """Return some prompts."""
    return [prompts[row] for row in rows]
