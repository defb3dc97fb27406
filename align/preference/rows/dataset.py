"""Prompts with their completions as token ids, in a few flat arrays however many there are."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from align.preference.groups import Group
from finetune.data.conversation import Conversation
from finetune.data.report import DataReport


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """A prompt and its K completions, the best first.

    ``prompt_ids``: (P,) int32. ``completion_ids``: K arrays (C_k,) int32; every token of them is learnt or
    scored, the last is the end token unless it was cut. ``scores``: (K,) float64, not a number where the data
    has none; for a label 1 (good) or 0 (bad). ``ranks``: (K,) int32, 0 is the best, ties share one.
    ``margin``: how much better the first is than the last, not a number where the data does not say.
    ``row`` is the group's number, ``place`` is ``file:line``, ``source`` the source's number.
    """

    prompt_ids: NDArray[np.int32]
    completion_ids: tuple[NDArray[np.int32], ...]
    scores: NDArray[np.float64]
    ranks: NDArray[np.int32]
    margin: float
    row: int
    place: str
    source: int

    def as_tensors(self) -> Group:
        """Return the token ids as tensors, for a forward pass."""
        ids = (self.prompt_ids, *self.completion_ids)
        prompt, *completions = (torch.from_numpy(part.astype(np.int64)) for part in ids)
        return Group(prompt, tuple(completions))


@dataclass(frozen=True)
class PreferenceGroups:
    """Groups in flat arrays, S = all prompts and completions, G = groups.

    ``input_ids``: every prompt followed by its completions, int32. ``starts``: (S + 1,) where each of them
    begins. ``firsts``: (G + 1,) which of them is each group's prompt. ``scores``, ``ranks``: (S - G,), a
    value a completion. ``margins``: (G,). Of each group ``places`` (``file:line``) and ``sources``.
    """

    input_ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    firsts: NDArray[np.int64]
    scores: NDArray[np.float64]
    ranks: NDArray[np.int32]
    margins: NDArray[np.float64]
    places: tuple[str, ...]
    sources: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.places)

    def __getitem__(self, index: int) -> TokenizedGroup:
        """Return one group; its arrays are views."""
        index = range(len(self))[index]
        first, end = (int(number) for number in self.firsts[index : index + 2])
        pieces = [self.input_ids[self.starts[i] : self.starts[i + 1]] for i in range(first, end)]
        own = slice(first - index, end - index - 1)
        return TokenizedGroup(
            prompt_ids=pieces[0],
            completion_ids=tuple(pieces[1:]),
            scores=self.scores[own],
            ranks=self.ranks[own],
            margin=float(self.margins[index]),
            row=index,
            place=self.places[index],
            source=self.sources[index],
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return each group's number of tokens, the prompt counted once: (G,)."""
        return np.diff(self.starts[self.firsts])

    @property
    def completions(self) -> NDArray[np.int64]:
        """Return each group's number of completions K: (G,)."""
        return np.diff(self.firsts) - 1

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Return the length of each group's prompt: (G,)."""
        return np.diff(self.starts)[self.firsts[:-1]]

    @property
    def completion_lengths(self) -> NDArray[np.int64]:
        """Return the length of each completion: (S - G,)."""
        return np.delete(np.diff(self.starts), self.firsts[:-1])

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, every prompt counted once."""
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """Return the length of the longest prompt with one completion."""
        prompts = np.repeat(self.prompt_lengths, self.completions)
        return int((prompts + self.completion_lengths).max())


@dataclass(frozen=True)
class PreparedPreferences:
    """Everything a run needs of its preference data; ``prompts`` hold the best completion as their reply."""

    train: PreferenceGroups
    held_out: PreferenceGroups | None
    prompts: list[Conversation]
    report: DataReport
