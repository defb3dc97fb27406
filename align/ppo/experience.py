"""PPO experience: generate completions, score them, compute per-token rewards, GAE advantages and returns."""

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
"""Random streams of prompt order and minibatch order: separate, so that one never shifts the other."""


@dataclass
class Collector:
    """Generates and scores completions with policy, reference, value and reward models.

    Attributes:
        actor_critic: policy and value model.
        reference_policy: the initial policy.
        rewards: the rewards to maximize.
        encoder: decodes completions to text.
        sampling: sampling parameters.
        precision: of forward passes.
        micro_batch_size: completions per forward pass.
        seconds: time spent per kind of work since the last rollout.
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
        """Sample one completion per prompt and score it.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        with self.timed("generation"):
            ids = [prompt.ids for prompt in prompts]
            completions = sample(self.roles.policy, ids, sampling=self.sampling, seed=seed)
        with self.timed("scoring"):
            return judged_replies(prompts, completions, self.rewards, self.encoder)

    @torch.no_grad()
    def read(self, replies: Replies, passes: Sequence[Sequence[int]]) -> Said:
        """Return policy and reference log-probabilities, values and entropies of the completions' tokens.

        Each process scores its shard of the micro-batches.

        Args:
            completions: the sampled completions.
            micro_batches: completion indices of each micro-batch; they cover every completion once.
        """
        longest, count = int(replies.lengths.max()), len(replies.completions)
        device, pad = next(self.roles.parameters()).device, self.sampling.stop_ids[0]
        names = ("logps", "reference_logps", "values", "entropies")
        tables = {name: torch.zeros(count, longest) for name in names}
        with self.timed("scoring"), arithmetic(self.roles.policy, self.precision):
            # The same number on every rank: a sharded model all-gathers in each forward pass.
            for part, _ in share_in_step(passes):
                ids = [replies.prompts[i].ids for i in part], [replies.completions[i].ids for i in part]
                laid = lay_out(*ids, pad_id=pad)
                batch = {name: value.to(device) for name, value in laid.items() if isinstance(value, Tensor)}
                logps, entropies, values, _ = self.roles(batch, spread=True)
                # Reference and policy share the base: the initial adapter weights are swapped in.
                with self.start.in_place():
                    reference, _ = policy_tables(
                        self.roles.policy, batch, temperature=self.roles.temperature, spread=False
                    )
                for name, found in zip(names, (logps, reference, values, entropies), strict=True):
                    tables[name][list(part), : found.shape[1]] = found.float().cpu()
            return Said(**_of_all(tables, [index for part in share(passes) for index in part]))

    def passes(self, replies: Replies) -> list[list[int]]:
        """Return micro-batches that cover all completions, sorted by length to reduce padding."""
        order = np.argsort(-_lengths(replies), kind="stable").tolist()
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add the duration of the block to ``seconds[work]``."""
        start = time.monotonic()
        yield
        self.seconds[work] = self.seconds.get(work, 0.0) + time.monotonic() - start


def _of_all(tables: dict[str, Tensor], own: Sequence[int]) -> dict[str, Tensor]:
    """All-gather tensors: each process contributes its ``local_rows``."""
    for lines, part in everyones((list(own), {name: table[own] for name, table in tables.items()})):
        for name, table in part.items():
            tables[name][lines] = table
    return tables


def rows_of_rollout(prompts: int, size: int, rollout: int, *, seed: int) -> list[int]:
    """Return the prompt indices of a rollout: the prompts are reshuffled for every pass over them.

    >>> one, two = rows_of_rollout(4, 2, 0, seed=0), rows_of_rollout(4, 2, 1, seed=0)
    >>> sorted(one + two)
    [0, 1, 2, 3]
    """
    places = range(rollout * size, (rollout + 1) * size)
    # A rollout may span two epochs, which have different permutations.
    orders = {
        epoch: np.random.default_rng([seed, PROMPTS, epoch]).permutation(prompts).tolist()
        for epoch in {place // prompts for place in places}
    }
    return [orders[place // prompts][place % prompts] for place in places]


def cut_updates(
    lengths: Sequence[int], *, batch_size: int, size: int, draw: Sequence[int]
) -> list[list[list[int]]]:
    """Split a rollout into the minibatches of one PPO epoch, and each minibatch into micro-batches.

    Args:
        lengths: (C,) tokens of prompt plus completion.
        batch_size: completions per optimizer step; it divides C.
        micro_batch_size: completions per forward pass.
        seeds: determine the shuffle.

    >>> cut_updates([3, 9, 4, 8], batch_size=4, size=2, draw=[0])
    [[[1, 3], [2, 0]]]
    """
    order = np.random.default_rng([CUT, *draw]).permutation(len(lengths))
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # Sorted within the minibatch: completions of similar length share a micro-batch, which saves padding.
    longest_first = -np.asarray(lengths)
    by_length = [step[np.argsort(longest_first[step], kind="stable")].tolist() for step in steps]
    return [[step[start : start + size] for start in range(0, len(step), size)] for step in by_length]


def whole_lengths(replies: Replies) -> np.ndarray:
    """Return the tokens of prompt plus completion: (C,)."""
    own: np.ndarray = np.array([len(prompt.ids) for prompt in replies.prompts]) + _lengths(replies)
    return own


def _lengths(replies: Replies) -> np.ndarray:
    return np.array([len(one.ids) for one in replies.completions])


def shaped_scores(replies: Replies, settings: PpoSettings, running: scores.Running) -> Tensor:
    """Return the shaped rewards that PPO maximizes: (C,); normalized, then clipped, then the EOS penalty."""
    found = replies.rewards
    if settings.normalise == "running":
        found = running.normalise(found, shift_mean=True)
    if settings.clip_scores is not None:
        found = scores.clip_scores(found, limit=settings.clip_scores)
    # Last, so that neither normalization nor clipping changes the penalty.
    return scores.missing_end(found, replies.stopped, value=settings.missing_end)


def learnt_from(
    said: Said, found: Tensor, lengths: Tensor, *, coefficient: float, settings: PpoSettings
) -> Tables:
    """Return the rollout's tensors with GAE advantages and returns per token.

    Args:
        stats: log-probabilities and values of the tokens, (C, T).
        rewards_C: (C,) shaped rewards.
        lengths_C: (C,) tokens of each completion.
        kl_coef: KL coefficient (beta) of the per-token penalty.
        settings: gamma, lambda, KL estimator, whitening.
    """
    mask = token_mask(lengths, said.logps.shape[1])
    # The KL penalty is part of the reward of every token; the score is paid at the last one.
    distance = kl.kl_terms(said.logps, said.reference_logps, estimator=settings.kl_estimator)
    rewards = advantages.token_rewards(distance, found, lengths, coefficient=coefficient)
    # The mean is retained: a constant added to every token would reward or punish length.
    if settings.whiten_rewards:
        rewards = masked.whiten(rewards, mask, shift_mean=False)
    gained, returns = advantages.advantages(
        rewards, said.values, mask, discount=settings.discount, trace=settings.trace
    )
    if settings.whiten_advantages:
        gained = masked.whiten(gained, mask, shift_mean=True)
    return Tables(said.logps, said.reference_logps, said.values, gained, returns)


def episodes_of(rows: Sequence[int], replies: Replies, tables: Tables) -> Episodes:
    """Return the rollout that the PPO epochs train on."""
    prompts = tuple(prompt.ids for prompt in replies.prompts)
    return Episodes(tuple(rows), prompts, tuple(one.ids for one in replies.completions), tables)


def select(prompts: Prompts, rows: Sequence[int]) -> list[Prompt]:
    """Return the prompts at ``indices``."""
    return [prompts[row] for row in rows]
