"""Sample and score n completions per prompt, in chunks that are cached so that a run can resume."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from align.rejection.selection import Candidate
from align.rl.completions import score_completions
from align.rl.prompts import Prompts
from align.rl.rewards.rewards import Rewards
from align.rl.sampling import Sampling, sample_completions
from finetune.data.cache import DamagedCacheError, read_cached, write_cached
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import broadcast_object
from finetune.distributed.rank import dist_info

CANDIDATES_PER_CHUNK = 512
"""Approximate number of completions per chunk, which is sampled, scored and stored at once."""
NUM_PROGRESS_MESSAGES = 10
"""Approximate number of progress messages per round."""
StoredArrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CandidateSampler:
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
    num_generations: int
    log: Callable[[str], None]
    raise_if_interrupted: Callable[[str], None]

    def sample(
        self,
        prompt_indices: Sequence[int],
        load_policy: Callable[[], nn.Module],
        *,
        seeds: Sequence[int],
        store_prefix: Path | None,
    ) -> list[Candidate]:
        """Return scored completions, the ``num_generations`` of a prompt consecutively.

        Args:
            prompt_indices: the prompts to sample for.
            load_policy: returns the model; called only if a chunk is not stored yet.
            seeds: random seeds.
            store_prefix: path prefix of the stored chunks; None: nothing is stored.

        Raises:
            UserError: a reward function failed on a completion.
            Interrupted: a signal arrived; sampled completions are stored.
        """
        # Complete prompts: a reward model encodes a prompt once for its consecutive completions.
        prompts_per_chunk = max(1, CANDIDATES_PER_CHUNK // self.num_generations)
        chunks = [
            prompt_indices[offset : offset + prompts_per_chunk]
            for offset in range(0, len(prompt_indices), prompts_per_chunk)
        ]
        candidates: list[Candidate] = []
        started_at, num_new = time.monotonic(), 0
        for index, chunk in enumerate(chunks):
            file = (
                None
                if store_prefix is None
                else store_prefix.with_name(f"{store_prefix.name}-{index:04}.safetensors")
            )
            # Only rank 0 reads: all ranks must agree on whether to sample.
            arrays = broadcast_object(self._load_stored(file) if dist_info().is_main else None)
            if arrays is None:
                # A seed per chunk: a resumed round samples the missing chunks as it would have.
                arrays = self._sample_chunk(chunk, load_policy(), seed=_combine_seeds([*seeds, index]))
                num_new += len(chunk) * self.num_generations
                if file is not None and dist_info().is_main:
                    write_cached(file, arrays, {})
            candidates += self._to_candidates(chunk, arrays)
            if (
                num_new
                and (index + 1) % max(1, len(chunks) // NUM_PROGRESS_MESSAGES) == 0
                and len(chunks) > 1
            ):
                # Chunks that were stored already took no time.
                rate = num_new / (time.monotonic() - started_at)
                total = len(prompt_indices) * self.num_generations
                self.log(f"  {len(candidates)} of {total} completions, {rate:.1f} per second")
            # Only where chunks are stored: an interrupted evaluation would lose its completions.
            if store_prefix is not None:
                self.raise_if_interrupted(f"after {len(candidates)} completions, which are stored")
        return candidates

    def _load_stored(self, file: Path | None) -> StoredArrays | None:
        """Return a stored chunk, or None; a corrupt file is reported and sampled again."""
        if file is None:
            return None
        try:
            loaded = read_cached(file)
        except DamagedCacheError as error:
            self.log(f"corrupt file, sampling these completions again: {error}")
            return None
        return None if loaded is None else loaded[0]

    def _sample_chunk(self, chunk: Sequence[int], model: nn.Module, *, seed: int) -> StoredArrays:
        prompts = [self.prompts[index] for index in chunk for _ in range(self.num_generations)]
        completions = sample_completions(
            model, [prompt.ids for prompt in prompts], sampling=self.sampling, seed=seed
        )
        scores = score_completions(prompts, completions, self.rewards, self.encoder).scores
        return {
            # Token ids and not texts: the store holds arrays, and decoding is deterministic.
            "ids": np.concatenate([np.asarray(completion.ids, dtype=np.int32) for completion in completions]),
            "lengths": np.asarray([len(completion.ids) for completion in completions]),
            "ended": np.asarray([completion.ended_with_eos for completion in completions]),
            "rewards": scores.total,
            "parts": np.stack([scores.by_source[name] for name in self.rewards.names]),
        }

    def _to_candidates(self, chunk: Sequence[int], arrays: StoredArrays) -> list[Candidate]:
        token_ids = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        return [
            Candidate(
                chunk[row // self.num_generations],
                self.encoder.decode_reply(ids.tolist()),
                bool(arrays["ended"][row]),
                float(arrays["rewards"][row]),
                dict(zip(self.rewards.names, arrays["parts"][:, row].tolist(), strict=True)),
            )
            for row, ids in enumerate(token_ids)
        ]


def round_prompt_indices(
    num_prompts: int, prompts_per_round: int | None, round_index: int, *, seed: int
) -> list[int]:
    """Return the prompt indices of a round: consecutive slices of one shuffle, cyclically.

    Args:
        num_prompts: number of prompts.
        prompts_per_round: prompts per round; None: all.
        round_index: index of the round, from 1.
        seed: of the shuffle.
    """
    size = min(prompts_per_round or num_prompts, num_prompts)
    # The same shuffle in every round: no prompt comes twice before all have come once.
    permutation = np.random.default_rng([seed, num_prompts]).permutation(num_prompts)
    return [
        int(permutation[position % num_prompts])
        for position in range((round_index - 1) * size, round_index * size)
    ]


def _combine_seeds(seeds: Sequence[int]) -> int:
    """Combine several seeds into one."""
    # SeedSequence: torch takes one integer, and a sum of seeds would collide across rounds and chunks.
    return int(np.random.SeedSequence(list(seeds)).generate_state(1)[0])
