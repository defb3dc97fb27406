"""A PPO rollout: sampled completions with log-probabilities, values, advantages and returns per token."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.preference.groups import GroupBatch
from align.rl.token_stats import collate_completions, token_mask

TokenIdTuple = tuple[int, ...]


class RolloutBatch(GroupBatch):
    """One micro-batch of a rollout: one row per completion. C completions, T tokens of the longest one.

    Attributes:
        rows: (C,) index of each completion's prompt.
        mask: (C, T) bool, true at the tokens of a completion.
        old_logps, old_values, advantages, returns: (C, T), 0 after the end of a completion.
    """

    rows: Tensor
    mask: Tensor
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class RolloutTensors:
    """Per-token tensors of a rollout: (C, T) = completions x longest completion, 0 after the end of each.

    Attributes:
        logps: log-probabilities under the sampling policy (old policy).
        reference_logps: log-probabilities under the reference policy.
        values: value estimates at sampling time (old values).
        advantages: GAE advantages, whitened if ``ppo.whiten_advantages``.
        returns: regression targets of the value model.
    """

    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Rollout:
    """The completions of a rollout, in the order in which they were sampled.

    Attributes:
        prompt_indices: (C,) index of each completion's prompt.
        prompts: token ids of each completion's prompt.
        completions: token ids, including EOS if the completion has one.
        tensors: per-token tensors.
    """

    prompt_indices: tuple[int, ...]
    prompts: tuple[TokenIdTuple, ...]
    completions: tuple[TokenIdTuple, ...]
    tensors: RolloutTensors

    def __len__(self) -> int:
        return len(self.prompt_indices)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completions]

    def batch(self, indices: Sequence[int], *, pad_id: int) -> RolloutBatch:
        """Collate the completions at ``indices`` into one micro-batch."""
        group_batch = collate_completions(
            [self.prompts[i] for i in indices], [self.completions[i] for i in indices], pad_id=pad_id
        )
        max_length, indices_C = int(group_batch["lengths"].max()), torch.tensor(indices)
        tensors = self.tensors
        # Cut to this micro-batch's longest completion: the stored tensors have the width of the rollout.
        return {
            **group_batch,
            # BaseTrainer names these rows if the loss is NaN.
            "rows": torch.tensor([self.prompt_indices[i] for i in indices]),
            "mask": token_mask(group_batch["lengths"], max_length),
            "old_logps": tensors.logps[indices_C, :max_length],
            "old_values": tensors.values[indices_C, :max_length],
            "advantages": tensors.advantages[indices_C, :max_length],
            "returns": tensors.returns[indices_C, :max_length],
        }

    def save(self, file: Path) -> None:
        """Write the rollout to a safetensors file, so that PPO resumes within a rollout."""
        # safetensors refuses tensors that are not contiguous.
        tensors = {name: tensor.contiguous() for name, tensor in vars(self.tensors).items()}
        # safetensors holds no ragged arrays: token ids are stored flat, with their lengths.
        ids = {"prompts": self.prompts, "completions": self.completions}
        flat_ids = {
            name: torch.tensor([token for sequence in sequences for token in sequence])
            for name, sequences in ids.items()
        }
        lengths = {
            f"{name}_lengths": torch.tensor(list(map(len, sequences))) for name, sequences in ids.items()
        }
        save_file({**tensors, **flat_ids, **lengths, "rows": torch.tensor(self.prompt_indices)}, file)

    @classmethod
    def load(cls, file: Path) -> "Rollout":
        """Read a rollout written by ``save``."""
        stored = load_file(file)
        tensors = RolloutTensors(**{field.name: stored[field.name] for field in fields(RolloutTensors)})
        prompts, completions = (
            _split_by_length(stored[name].tolist(), stored[f"{name}_lengths"].tolist())
            for name in ("prompts", "completions")
        )
        return cls(tuple(stored["rows"].tolist()), prompts, completions, tensors)


def _split_by_length(flat_ids: list[int], lengths: list[int]) -> tuple[TokenIdTuple, ...]:
    stops = accumulate(lengths)
    return tuple(tuple(flat_ids[stop - length : stop]) for stop, length in zip(stops, lengths, strict=True))
