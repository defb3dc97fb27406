"""Token statistics of completions: log-probabilities, entropies, values; one row per completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.preference.groups import Group, GroupBatch, GroupCollator
from align.preference.logps import completion_logits, gather_logps
from align.rl.maths.losses import entropy
from finetune.generation.sampler import TokenIds
from finetune.training.loss import MAX_LOGITS_PER_CHUNK, output_head
from finetune.training.model import unwrap_model


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics: (C, T) = completions x longest completion, 0 after the end of each."""

    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    entropies: Tensor


def collate_completions(
    prompts: Sequence[TokenIds], completions: Sequence[TokenIds], *, pad_id: int
) -> GroupBatch:
    """Collate prompts and completions into a right-padded batch with one row per completion."""
    groups = [
        Group(torch.tensor(prompt), (torch.tensor(completion),))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    # Each group has one completion, so no prompt is shared and no block mask is needed.
    return GroupCollator(pad_id, one_per_row=True)(groups)


def token_mask(lengths_C: Tensor, max_length: int) -> Tensor:
    """Return the mask of completion tokens: (C, T) bool.

    >>> token_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    return torch.arange(max_length) < lengths_C[:, None]


def token_logps_and_entropy(
    policy: nn.Module, batch: Mapping[str, Tensor], *, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Return (C, T) log-probabilities of the completions, and entropies if ``with_entropy``, else 0."""
    logits = completion_logits(policy, output_head(unwrap_model(policy)), batch)
    # The policy gradient needs the distribution that was sampled from.
    if temperature != 1.0:
        logits = logits / temperature
    state_index_N, targets_N = batch["state_index"], batch["targets"]
    logps_CT = to_padded(
        gather_logps(logits, state_index_N, targets_N, max_elements=MAX_LOGITS_PER_CHUNK), batch
    )
    # Once per predicting state, then gathered per token; skipped where no entropy is needed, as it is costly.
    entropies_CT = (
        to_padded(entropy(logits)[state_index_N], batch) if with_entropy else torch.zeros_like(logps_CT)
    )
    return logps_CT, entropies_CT


def to_padded(values_N: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Scatter per-token values (N,) to a padded (C, T) tensor, 0 after the end of each completion."""
    padded_CT = values_N.new_zeros(len(batch["lengths"]), int(batch["lengths"].max()))
    # Out of place: gradients flow back to the values.
    return padded_CT.index_put((batch["completion_index"], batch["token_offset"]), values_N)
