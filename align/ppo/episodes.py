"""A PPO rollout: sampled completions with log-probabilities, values, advantages and returns per token."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.preference.groups import GroupBatch
from align.rl.reading import lay_out, token_mask

Ids = tuple[int, ...]


class EpisodeBatch(GroupBatch):
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
class Tables:
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
class Episodes:
    """The completions of a rollout, in the order in which they were sampled.

    Attributes:
        prompt_indices: (C,) index of each completion's prompt.
        prompts: token ids of each completion's prompt.
        completions: token ids, including EOS if the completion has one.
        tensors: per-token tensors.
    """

    rows: tuple[int, ...]
    prompts: tuple[Ids, ...]
    completions: tuple[Ids, ...]
    tables: Tables

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completions]

    def batch(self, chosen: Sequence[int], *, pad_id: int) -> EpisodeBatch:
        """Collate the completions at ``indices`` into one micro-batch."""
        layout = lay_out(
            [self.prompts[i] for i in chosen], [self.completions[i] for i in chosen], pad_id=pad_id
        )
        longest, index = int(layout["lengths"].max()), torch.tensor(chosen)
        own = self.tables
        # Cut to this micro-batch's longest completion: the stored tensors have the width of the rollout.
        return {
            **layout,
            "rows": torch.tensor([self.rows[i] for i in chosen]),
            "mask": token_mask(layout["lengths"], longest),
            "old_logps": own.logps[index, :longest],
            "old_values": own.values[index, :longest],
            "advantages": own.advantages[index, :longest],
            "returns": own.returns[index, :longest],
        }

    def save(self, file: Path) -> None:
        """Write the rollout to a safetensors file, so that PPO resumes within a rollout."""
        tables = {name: table.contiguous() for name, table in vars(self.tables).items()}
        # safetensors holds no ragged arrays: token ids are stored flat, with their lengths.
        ids = {"prompts": self.prompts, "completions": self.completions}
        flat = {name: torch.tensor([token for row in rows for token in row]) for name, rows in ids.items()}
        lengths = {f"{name}_lengths": torch.tensor(list(map(len, rows))) for name, rows in ids.items()}
        save_file({**tables, **flat, **lengths, "rows": torch.tensor(self.rows)}, file)

    @classmethod
    def load(cls, file: Path) -> "Episodes":
        """Read a rollout written by ``save``."""
        found = load_file(file)
        tables = Tables(**{field.name: found[field.name] for field in fields(Tables)})
        prompts, completions = (
            _rows(found[name].tolist(), found[f"{name}_lengths"].tolist())
            for name in ("prompts", "completions")
        )
        return cls(tuple(found["rows"].tolist()), prompts, completions, tables)


def _rows(flat: list[int], lengths: list[int]) -> tuple[Ids, ...]:
    ends = accumulate(lengths)
    return tuple(tuple(flat[end - length : end]) for end, length in zip(ends, lengths, strict=True))
