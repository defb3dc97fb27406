"""A rollout: completions with what was said of them when they were sampled, and what is learnt from them."""

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
    """One forward pass over completions in lines of their own, with what is known of them.

    Attributes:
        rows: (episodes,) the numbers of their prompts.
        mask: (episodes, tokens), true where a completion has a token.
        old_logps, old_values, advantages, returns: (episodes, tokens), 0 behind a completion's end.
    """

    rows: Tensor
    mask: Tensor
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Tables:
    """Numbers of each token of each completion, (episodes, longest), 0 behind a completion's end.

    Attributes:
        logps: under the policy that sampled.
        reference_logps: under the policy as it started.
        values: when it was sampled.
        advantages: what is learnt, whitened where asked for.
        returns: what values should have been.
    """

    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Episodes:
    """A rollout's completions, in the order in which they were sampled.

    Attributes:
        rows: (episodes,) the number of each one's prompt.
        prompts: token ids.
        completions: token ids, with the end token where there is one.
        tables: numbers of each token.
    """

    rows: tuple[int, ...]
    prompts: tuple[Ids, ...]
    completions: tuple[Ids, ...]
    tables: Tables

    def __len__(self) -> int:
        """Return the number of completions."""
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each completion."""
        return [len(ids) for ids in self.completions]

    def batch(self, chosen: Sequence[int], *, pad_id: int) -> EpisodeBatch:
        """Return one forward pass over some episodes."""
        layout = lay_out(
            [self.prompts[i] for i in chosen], [self.completions[i] for i in chosen], pad_id=pad_id
        )
        longest, index = int(layout["lengths"].max()), torch.tensor(chosen)
        own = self.tables
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
        """Write everything to a safetensors file."""
        tables = {name: table.contiguous() for name, table in vars(self.tables).items()}
        ids = {"prompts": self.prompts, "completions": self.completions}
        flat = {name: torch.tensor([token for row in rows for token in row]) for name, rows in ids.items()}
        lengths = {f"{name}_lengths": torch.tensor(list(map(len, rows))) for name, rows in ids.items()}
        save_file({**tables, **flat, **lengths, "rows": torch.tensor(self.rows)}, file)

    @classmethod
    def load(cls, file: Path) -> "Episodes":
        """Read what ``save`` wrote."""
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
