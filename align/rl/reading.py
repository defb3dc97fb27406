"""Token statistics of completions: log-probabilities, entropies, values; one row per completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.preference.attention import unwrapped
from align.preference.groups import Group, GroupBatch, GroupCollator
from align.preference.logps import completion_logits, picked_logps
from align.rl.maths.losses import entropy
from finetune.training.head import output_head
from finetune.training.loss import MAX_ELEMENTS

Ids = Sequence[int]


@dataclass(frozen=True)
class Said:
    """Per-token statistics: (C, T) = completions x longest completion, 0 after the end of each."""

    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    entropies: Tensor


def lay_out(prompts: Sequence[Ids], completions: Sequence[Ids], *, pad_id: int) -> GroupBatch:
    """Collate prompts and completions into a right-padded batch with one row per completion."""
    groups = [
        Group(torch.tensor(prompt), (torch.tensor(completion),))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return GroupCollator(pad_id, separate=True)(groups)


def token_mask(lengths: Tensor, longest: int) -> Tensor:
    """Return the mask of completion tokens: (C, T) bool.

    >>> token_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    return torch.arange(longest) < lengths[:, None]


def policy_tables(
    policy: nn.Module, batch: Mapping[str, Tensor], *, temperature: float, spread: bool
) -> tuple[Tensor, Tensor]:
    """Return (C, T) log-probabilities of the completions, and entropies if ``with_entropy``, else 0."""
    logits = completion_logits(policy, output_head(unwrapped(policy)), batch)
    # The policy gradient needs the distribution that was sampled from.
    if temperature != 1.0:
        logits = logits / temperature
    sources, targets = batch["sources"], batch["targets"]
    logps = as_table(picked_logps(logits, sources, targets, max_elements=MAX_ELEMENTS), batch)
    # Once per predicting state, then gathered per token; skipped where no entropy is needed, as it is costly.
    entropies = as_table(entropy(logits)[sources], batch) if spread else torch.zeros_like(logps)
    return logps, entropies


def as_table(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Scatter per-token values (N,) to a padded (C, T) tensor, 0 after the end of each completion."""
    table = values.new_zeros(len(batch["lengths"]), int(batch["lengths"].max()))
    return table.index_put((batch["owners"], batch["offsets"]), values)
