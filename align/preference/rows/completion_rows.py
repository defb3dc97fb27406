"""One row per completion (prompt + completion), for pre-flight checks and the data preview."""

import numpy as np
from numpy.typing import NDArray

from align.preference.rows.dataset import PreferenceGroups, TokenizedGroup
from finetune.data.dataset import TokenizedRows


def as_rows(groups: PreferenceGroups) -> TokenizedRows:
    """Return one row per completion, with loss on the completion; its location names the completion."""
    ids: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    starts, places = [0], []
    for group in (groups[index] for index in range(len(groups))):
        for number, completion in enumerate(group.completion_ids):
            ids += [group.prompt_ids, completion]
            trained += [np.zeros(len(group.prompt_ids), bool), np.ones(len(completion), bool)]
            starts.append(starts[-1] + len(group.prompt_ids) + len(completion))
            places.append(f"{group.place}, {_called(group, number)}")
    arrays = {"input_ids": np.concatenate(ids), "trained": np.concatenate(trained)}
    arrays["starts"] = np.asarray(starts, dtype=np.int64)
    return TokenizedRows(arrays, places, np.repeat(groups.sources, groups.completions).tolist())


def _called(group: TokenizedGroup, number: int) -> str:
    """Return the label of a completion: good/bad, chosen/rejected, or its rank, with its score."""
    score = f", score {group.scores[number]:g}" if np.isfinite(group.scores[number]) else ""
    if len(group.ranks) == 1:
        return "good" if group.scores[number] == 1 else "bad"
    if len(group.ranks) == 2:
        return ("chosen", "rejected")[number] + score
    return f"rank {group.ranks[number] + 1} of {len(group.ranks)}{score}"
