"""Order of PPO: the prompts and the seed of each rollout, and its minibatches for every PPO epoch."""

from collections.abc import Sequence

import numpy as np

EVAL_ROLLOUT_INDEX = -1
"""Rollout index of the held-out completions: always the same seed, and no rollout's."""
PROMPT_ORDER_STREAM, MINIBATCH_STREAM = 0, 1
"""Random streams of prompt order and minibatch order: separate, so that one never shifts the other."""


def sampling_seed(seed: int, rollout_index: int) -> int:
    """Return the sampling seed of a rollout; index -1 is evaluation."""
    # A large prime: runs with neighboring seeds share no rollout seed.
    return seed * 1_000_003 + rollout_index + 1


def rollout_prompt_indices(
    num_prompts: int, rollout_size: int, rollout_index: int, *, seed: int
) -> list[int]:
    """Return the prompt indices of a rollout: the prompts are reshuffled for every pass over them.

    >>> first, second = rollout_prompt_indices(4, 2, 0, seed=0), rollout_prompt_indices(4, 2, 1, seed=0)
    >>> sorted(first + second)
    [0, 1, 2, 3]
    """
    # Positions in the endless stream of epochs: a checkpoint needs the index of the rollout only.
    positions = range(rollout_index * rollout_size, (rollout_index + 1) * rollout_size)
    # A rollout may span two epochs, which have different permutations.
    permutations = {
        epoch: np.random.default_rng([seed, PROMPT_ORDER_STREAM, epoch]).permutation(num_prompts).tolist()
        for epoch in {position // num_prompts for position in positions}
    }
    return [permutations[position // num_prompts][position % num_prompts] for position in positions]


def make_minibatches(
    lengths: Sequence[int], *, batch_size: int, micro_batch_size: int, seeds: Sequence[int]
) -> list[list[list[int]]]:
    """Split a rollout into the minibatches of one PPO epoch, and each minibatch into micro-batches.

    Args:
        lengths: (C,) tokens of prompt plus completion.
        batch_size: completions per optimizer step; it divides C.
        micro_batch_size: completions per forward pass.
        seeds: determine the shuffle.

    >>> make_minibatches([3, 9, 4, 8], batch_size=4, micro_batch_size=2, seeds=[0])
    [[[1, 3], [2, 0]]]
    """
    order = np.random.default_rng([MINIBATCH_STREAM, *seeds]).permutation(len(lengths))
    minibatches = [order[offset : offset + batch_size] for offset in range(0, len(order), batch_size)]
    # Sorted within the minibatch: completions of similar length share a micro-batch, which saves padding.
    negative_lengths = -np.asarray(lengths)
    sorted_minibatches = [
        minibatch[np.argsort(negative_lengths[minibatch], kind="stable")].tolist()
        for minibatch in minibatches
    ]
    return [
        [
            minibatch[offset : offset + micro_batch_size]
            for offset in range(0, len(minibatch), micro_batch_size)
        ]
        for minibatch in sorted_minibatches
    ]


def rollout_minibatches(
    lengths: Sequence[int],
    rollout_index: int,
    *,
    num_epochs: int,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
) -> list[list[list[int]]]:
    """Return the minibatches of all PPO epochs on a rollout, each as micro-batches of completion indices."""
    return [
        minibatch
        for epoch in range(num_epochs)
        for minibatch in make_minibatches(
            lengths,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seeds=[seed, rollout_index, epoch],
        )
    ]
