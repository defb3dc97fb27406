"""Sample and score n completions per prompt, in chunks that are cached so that a run can resume."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from align.rejection.choosing import Reply
from align.rl.prompts import Prompts
from align.rl.replies import judged_replies
from align.rl.rewards.rewards import Rewards
from align.rl.rollout import Sampling, sample
from finetune.data.cache import DamagedCacheError, store, stored
from finetune.data.tokens import Encoder
from finetune.planning.world import world
from finetune.training.processes import from_main

AT_ONCE = 512
"""Approximate number of completions per chunk, which is sampled, scored and stored at once."""
LINES = 10
"""Approximate number of progress messages per round."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Drawing:
    """Samples and scores ``num_generations`` completions per prompt.

    Attributes:
        prompts: the prompts.
        rewards: score the completions.
        encoder: decodes completions to text.
        sampling: sampling parameters.
        num_generations: completions per prompt (n).
        log: logs a message.
        raise_if_interrupted: raises Interrupted if a signal arrived.
    """

    prompts: Prompts
    rewards: Rewards
    encoder: Encoder
    sampling: Sampling
    samples: int
    say: Callable[[str], None]
    check: Callable[[str], None]

    def draw(
        self,
        numbers: Sequence[int],
        policy: Callable[[], nn.Module],
        *,
        seeds: Sequence[int],
        keep: Path | None,
    ) -> list[Reply]:
        """Return scored completions, the ``samples`` of a prompt consecutively.

        Args:
            prompt_indices: the prompts to sample for.
            load_policy: returns the model; called only if a chunk is not stored yet.
            seeds: random seeds.
            store_prefix: path prefix of the stored chunks; None: nothing is stored.

        Raises:
            UserError: a reward function failed on a completion.
            Interrupted: a signal arrived; sampled completions are stored.
        """
        # A chunk has all candidates of its prompts.
        each = max(1, AT_ONCE // self.samples)
        parts = [numbers[start : start + each] for start in range(0, len(numbers), each)]
        replies: list[Reply] = []
        begun, fresh = time.monotonic(), 0
        for index, part in enumerate(parts):
            file = None if keep is None else keep.with_name(f"{keep.name}-{index:04}.safetensors")
            # Only rank 0 reads: all ranks must agree on whether to sample.
            arrays = from_main(self._kept(file) if world().main else None)
            if arrays is None:
                # A seed per chunk: a resumed round samples the missing chunks as it would have.
                arrays = self._drawn(part, policy(), seed=_seed([*seeds, index]))
                fresh += len(part) * self.samples
                if file is not None and world().main:
                    store(file, arrays, {})
            replies += self._replies(part, arrays)
            if fresh and (index + 1) % max(1, len(parts) // LINES) == 0 and len(parts) > 1:
                # Chunks that were stored already took no time.
                rate = fresh / (time.monotonic() - begun)
                self.say(
                    f"  {len(replies)} of {len(numbers) * self.samples} completions, {rate:.1f} per second"
                )
            if keep is not None:
                self.check(f"after {len(replies)} completions, which are stored")
        return replies

    def _kept(self, file: Path | None) -> Arrays | None:
        """Return a stored chunk, or None; a corrupt file is reported and sampled again."""
        if file is None:
            return None
        try:
            found = stored(file)
        except DamagedCacheError as error:
            self.say(f"corrupt file, sampling these completions again: {error}")
            return None
        return None if found is None else found[0]

    def _drawn(self, part: Sequence[int], model: nn.Module, *, seed: int) -> Arrays:
        rows = [self.prompts[number] for number in part for _ in range(self.samples)]
        completions = sample(model, [row.ids for row in rows], sampling=self.sampling, seed=seed)
        judged = judged_replies(rows, completions, self.rewards, self.encoder).judged
        return {
            "ids": np.concatenate([np.asarray(one.ids, dtype=np.int32) for one in completions]),
            "lengths": np.asarray([len(one.ids) for one in completions]),
            "ended": np.asarray([one.stopped for one in completions]),
            "rewards": judged.total,
            "parts": np.stack([judged.parts[name] for name in self.rewards.names]),
        }

    def _replies(self, part: Sequence[int], arrays: Arrays) -> list[Reply]:
        pieces = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        return [
            Reply(
                part[row // self.samples],
                self.encoder.decode_reply(ids.tolist()),
                bool(arrays["ended"][row]),
                float(arrays["rewards"][row]),
                dict(zip(self.rewards.names, arrays["parts"][:, row].tolist(), strict=True)),
            )
            for row, ids in enumerate(pieces)
        ]


def prompts_of_round(total: int, count: int | None, number: int, *, seed: int) -> list[int]:
    """Return the prompt indices of a round: consecutive slices of one shuffle, cyclically.

    Args:
        num_prompts: number of prompts.
        prompts_per_round: prompts per round; None: all.
        round_index: index of the round, from 1.
        seed: of the shuffle.
    """
    each = min(count or total, total)
    order = np.random.default_rng([seed, total]).permutation(total)
    return [int(order[place % total]) for place in range((number - 1) * each, number * each)]


def _seed(parts: Sequence[int]) -> int:
    """Combine several seeds into one."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
