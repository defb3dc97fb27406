"""Precomputed reference log-probabilities: the rows that a run uses, the forward passes, the cache file."""

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
"""Increased when the meaning of a cached file changes, so that old files are not read."""

Logps = NDArray[np.float32]


def rows_of_steps(
    lengths: Sequence[int], *, steps: int, batch_size: int, seed: int, group_by_length: bool
) -> list[int]:
    """Return the rows that the first optimizer steps of a run use, in ascending order.

    >>> rows_seen_by_run([5, 5, 5, 5, 5, 5], steps=1, batch_size=2, seed=0, group_by_length=True)
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
    """Return the log-probabilities of all completion tokens under the current model, without dropout.

    The forward passes are sharded over processes; every process returns the values of all.

    Args:
        model: the policy before its first step; unchanged afterwards.
        groups: the data.
        rows: the groups to compute; the others are NaN.
        collate: the training collator, so that the numerics are those of training.
        batch_size: groups per forward pass.
        on_progress: callback with the number of finished groups over all processes, called equally often in
            each process; it may raise.

    Returns:
        (N,) float32, tokens of all completions concatenated.
    """
    ends = borders(groups)
    found = np.full(ends[-1], np.nan, dtype=np.float32)
    head, device = output_head(model), next(model.parameters()).device
    data, lengths = PreferenceRows(groups), groups.lengths
    # Longest first: similar lengths share a pass (little padding), and running out of memory shows at once.
    order = sorted(rows, key=lambda row: -lengths[row])
    passes = [order[start : start + size] for start in range(0, len(order), size)]
    with untouched(model):
        for first in range(0, len(passes), world().size):
            now = passes[first : first + world().size]
            # One part per process. In the last round it may repeat another rank's: with sharded weights every
            # rank must run every forward pass.
            for part, _ in share_in_step(now):
                laid = collate([data[row] for row in part])
                batch = {name: value.to(device) for name, value in laid.items()}
                table, counts = token_logps(model, head, batch).cpu(), batch["lengths"].tolist()
                flat = torch.cat([own[:number] for own, number in zip(table, counts, strict=True)]).numpy()
                sizes = [int(ends[row + 1] - ends[row]) for row in part]
                for row, own in zip(part, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
                    found[ends[row] : ends[row + 1]] = own
            done(sum(map(len, now)))
    # Each rank has NaN where it computed nothing; fmax takes the number of the two.
    merged: Logps = np.fmax.reduce(everyones(found))
    return merged


def reference_file(model: nn.Module, key: Mapping[str, Any], groups: PreferenceGroups) -> Path:
    """Return the cache file of reference log-probabilities, named by a digest of everything they depend on.

    Args:
        model: the policy before its first step: every weight of base and adapter.
        key: rows, precision, layout and versions, JSON-serializable.
        groups: the data: every token.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode())
    for array in (groups.input_ids, groups.starts, groups.firsts):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(model_digest(model).encode())
    return cache_file("reference", digest.hexdigest())


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model: weights, buffers, model config and adapter configs."""
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
    """Return a value that JSON lacks as text."""
    # Sets are sorted: their order follows Python's string hashes, which differ in every process.
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def kept_reference(path: Path) -> Logps | None:
    """Return the cached log-probabilities of an earlier run, None if there are none.

    Raises:
        DamagedCacheError: the file is not what was written.
    """
    found = stored(path)
    return None if found is None else found[0]["logps"]


def keep_reference(path: Path, logps: Logps) -> None:
    """Write reference log-probabilities to the cache.

    Raises:
        UserError: the folder cannot be written.
    """
    store(path, {"logps": logps}, {})
