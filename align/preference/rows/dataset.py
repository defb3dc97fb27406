"""Tokenized preference data: prompts with their completions, in flat arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from align.preference.groups import Group
from finetune.data.conversation import Conversation
from finetune.data.dataset import TokenizedRows
from finetune.data.pipeline import EncodedRows, probe_rows
from finetune.data.report import DataReport


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """A prompt and its K completions, best first.

    ``prompt_ids``: (P,) int32. ``completion_ids``: K arrays (T_k,) int32, trained or scored at every token;
    the last token is EOS unless truncated. ``scores``: (K,) float64, NaN if the data has none; for labels 1
    (good) or 0 (bad). ``ranks``: (K,) int32, 0 is the best, ties share one. ``margin``: preference margin of
    the first over the last, NaN if unknown. ``row``: index of the group, ``location``: ``file:line``,
    ``source``: index of the source.
    """

    prompt_ids: NDArray[np.int32]
    completion_ids: tuple[NDArray[np.int32], ...]
    scores: NDArray[np.float64]
    ranks: NDArray[np.int32]
    margin: float
    row: int
    location: str
    source: int

    def to_group(self) -> Group:
        """Return the token ids as tensors."""
        ids = (self.prompt_ids, *self.completion_ids)
        prompt, *completions = (torch.from_numpy(segment_ids.astype(np.int64)) for segment_ids in ids)
        return Group(prompt, tuple(completions))


@dataclass(frozen=True)
class PreferenceGroups:
    """G groups in flat arrays; a segment is a prompt or a completion, of which there are S.

    ``input_ids``: every prompt followed by its completions, int32. ``offsets``: (S + 1,) start of each
    segment. ``prompt_index``: (G + 1,) the segment that is each group's prompt. ``scores``, ``ranks``:
    (S - G,), one per completion. ``margins``, ``locations`` (``file:line``), ``source_ids``: (G,).
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_index: NDArray[np.int64]
    scores: NDArray[np.float64]
    ranks: NDArray[np.int32]
    margins: NDArray[np.float64]
    locations: Sequence[str]
    source_ids: Sequence[int] | NDArray[np.int32]

    @staticmethod
    def of(rows: EncodedRows) -> "PreferenceGroups":
        """Return tokenized rows as groups."""
        return PreferenceGroups(**rows.arrays, locations=rows.locations, source_ids=rows.source_ids)

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> TokenizedGroup:
        """Return one group; its arrays are views."""
        # `range` resolves negative indices and raises IndexError.
        index = range(len(self))[index]
        first, end = (int(segment) for segment in self.prompt_index[index : index + 2])
        segments = [self.input_ids[self.offsets[i] : self.offsets[i + 1]] for i in range(first, end)]
        # Scores and ranks have no entry for prompts, of which `index` come before this group.
        completion_slice = slice(first - index, end - index - 1)
        return TokenizedGroup(
            prompt_ids=segments[0],
            completion_ids=tuple(segments[1:]),
            scores=self.scores[completion_slice],
            ranks=self.ranks[completion_slice],
            margin=float(self.margins[index]),
            row=index,
            location=self.locations[index],
            source=int(self.source_ids[index]),
        )

    def __iter__(self) -> Iterator[TokenizedGroup]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each group, the prompt counted once: (G,)."""
        return np.diff(self.offsets[self.prompt_index])

    @property
    def num_completions(self) -> NDArray[np.int64]:
        """Return the number of completions K of each group: (G,)."""
        return np.diff(self.prompt_index) - 1

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Return the length of each group's prompt: (G,)."""
        return np.diff(self.offsets)[self.prompt_index[:-1]]

    @property
    def completion_lengths(self) -> NDArray[np.int64]:
        """Return the length of each completion: (S - G,)."""
        return np.delete(np.diff(self.offsets), self.prompt_index[:-1])

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, each prompt counted once."""
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """Return the length of the longest prompt with one completion."""
        prompts = np.repeat(self.prompt_lengths, self.num_completions)
        return int((prompts + self.completion_lengths).max())


def to_completion_rows(groups: PreferenceGroups) -> TokenizedRows:
    """Return one row per completion, with loss on the completion; its location names the completion."""
    ids: list[NDArray[np.int32]] = []
    loss_masks: list[NDArray[np.bool_]] = []
    offsets, locations = [0], []
    for group in groups:
        for number, completion in enumerate(group.completion_ids):
            ids += [group.prompt_ids, completion]
            loss_masks += [np.zeros(len(group.prompt_ids), bool), np.ones(len(completion), bool)]
            offsets.append(offsets[-1] + len(group.prompt_ids) + len(completion))
            locations.append(f"{group.location}, {_completion_label(group, number)}")
    arrays = {"input_ids": np.concatenate(ids), "loss_mask": np.concatenate(loss_masks)}
    arrays["offsets"] = np.asarray(offsets, dtype=np.int64)
    return TokenizedRows(arrays, locations, np.repeat(groups.source_ids, groups.num_completions).tolist())


def _completion_label(group: TokenizedGroup, index: int) -> str:
    """Return the label of a completion: good/bad, chosen/rejected, or its rank, with its score."""
    score = f", score {group.scores[index]:g}" if np.isfinite(group.scores[index]) else ""
    if len(group.ranks) == 1:
        return "good" if group.scores[index] == 1 else "bad"
    if len(group.ranks) == 2:
        return ("chosen", "rejected")[index] + score
    return f"rank {group.ranks[index] + 1} of {len(group.ranks)}{score}"


@dataclass(frozen=True)
class PreparedPreferences:
    """The preference data of a run; ``prompts`` are conversations that end with the best completion."""

    train: PreferenceGroups
    held_out: PreferenceGroups | None
    prompts: Sequence[Conversation]
    report: DataReport

    @property
    def probe_rows(self) -> list[list[int]]:
        """Return the token ids of a few training prompts, each with its best completion."""
        return probe_rows(len(self.train), self._best_ids)

    def _best_ids(self, row: int) -> NDArray[np.int32]:
        group = self.train[row]
        return np.concatenate([group.prompt_ids, group.completion_ids[0]])
