"""One row per completion (prompt + completion), for pre-flight checks and the data preview."""

import numpy as np
from numpy.typing import NDArray

from align.preference.rows.dataset import PreferenceGroups, TokenizedGroup
from finetune.data.dataset import TokenizedRows


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
