"""The reference, computed once before step 0: which rows a run looks at, their numbers, the cache."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from align.dpo.collate import PreferenceCollator, PreferenceRows, borders
from align.preference.attention import unwrapped
from align.preference.logps import token_logps
from align.preference.rows.dataset import PreferenceGroups
from finetune.data.batches import optimizer_batches
from finetune.data.cache import cache_file, store, stored
from finetune.planning.world import world
from finetune.training.head import output_head
from finetune.training.preflight.untouched import untouched
from finetune.training.processes import everyones, share_in_step

FORMAT = 1
"""Raised when the meaning of a kept file changes, so that old ones are not read."""

Logps = NDArray[np.float32]


def rows_of_steps(
    lengths: Sequence[int], *, steps: int, batch_size: int, seed: int, group_by_length: bool
) -> list[int]:
    """Return the rows that the first optimizer steps of a run look at, in order of their numbers.

    >>> rows_of_steps([5, 5, 5, 5, 5, 5], steps=1, batch_size=2, seed=0, group_by_length=True)
    [2, 5]
    """
    epochs = (
        optimizer_batches(lengths, batch_size, seed=seed, epoch=epoch, group_by_length=group_by_length)
        for epoch in count()
    )
    batches = (batch for epoch in epochs for batch in epoch)
    seen: set[int] = set()
    for batch in islice(batches, steps):
        seen.update(batch)
        if len(seen) == len(lengths):
            break
    return sorted(seen)


@torch.no_grad()
def reference_logps(
    model: nn.Module,
    groups: PreferenceGroups,
    rows: Collection[int],
    *,
    collate: PreferenceCollator,
    size: int,
    done: Callable[[int], None],
) -> Logps:
    """Return log-probabilities of all tokens of all completions under a model as it is, without dropout.

    Each process looks at its share of the forward passes, and has the numbers of all.

    Args:
        model: the policy before its first step; it is left as it is.
        groups: the data.
        rows: the groups to look at; the others are not a number.
        collate: as training has it.
        size: groups of a forward pass.
        done: is told how many groups are done, of all processes, as often in each; it may raise.

    Returns:
        (T,) float32, the completions' tokens end to end.
    """
    ends = borders(groups)
    found = np.full(ends[-1], np.nan, dtype=np.float32)
    head, device = output_head(model), next(model.parameters()).device
    data, lengths = PreferenceRows(groups), groups.lengths
    order = sorted(rows, key=lambda row: -lengths[row])
    passes = [order[start : start + size] for start in range(0, len(order), size)]
    with untouched(model):
        for first in range(0, len(passes), world().size):
            now = passes[first : first + world().size]
            for part, _ in share_in_step(now):  # one; in the last round perhaps another's
                laid = collate([data[row] for row in part])
                batch = {name: value.to(device) for name, value in laid.items()}
                table, counts = token_logps(model, head, batch).cpu(), batch["lengths"].tolist()
                flat = torch.cat([own[:number] for own, number in zip(table, counts, strict=True)]).numpy()
                sizes = [int(ends[row + 1] - ends[row]) for row in part]
                for row, own in zip(part, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
                    found[ends[row] : ends[row + 1]] = own
            done(sum(map(len, now)))
    merged: Logps = np.fmax.reduce(everyones(found))  # of two the one that is a number
    return merged


def reference_file(model: nn.Module, key: Mapping[str, Any], groups: PreferenceGroups) -> Path:
    """Return where the reference of some groups is kept: a name made of all that the numbers depend on.

    Args:
        model: the policy before its first step: base and adapter, every number of both.
        key: what else counts (rows, precision, layout, versions), as JSON takes it.
        groups: the data: every token.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode())
    for array in (groups.input_ids, groups.starts, groups.firsts):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(model_digest(model).encode())
    return cache_file("reference", digest.hexdigest())


def model_digest(model: nn.Module) -> str:
    """Return a digest of all that a model computes with: weights, buffers, and both configs."""
    digest = hashlib.sha256()
    configs = [unwrapped(model).config.to_dict()]
    if isinstance(model, PeftModel):
        configs += [config.to_dict() for config in model.peft_config.values()]
    digest.update(json.dumps(configs, sort_keys=True, default=_plain).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: object) -> object:
    """Return what JSON lacks as text; a set in order, which is another one in every process otherwise."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def kept_reference(path: Path) -> Logps | None:
    """Return the reference of an earlier run, None where there is none.

    Raises:
        DamagedCacheError: the file is not what was written.
    """
    found = stored(path)
    return None if found is None else found[0]["logps"]


def keep_reference(path: Path, logps: Logps) -> None:
    """Keep a reference for the next run.

    Raises:
        UserError: the folder cannot be written.
    """
    store(path, {"logps": logps}, {})
