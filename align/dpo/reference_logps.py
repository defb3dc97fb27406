"""Precomputed reference log-probabilities (TRL: ref_logps): rows of a run, forward passes, cache file."""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from align.dpo.collate import PreferenceCollator, PreferenceDataset, completion_offsets
from align.preference.logps import token_logps
from align.preference.reference_policy import autocast_for
from align.preference.rows.dataset import PreferenceGroups
from finetune.data.batches import optimizer_batches
from finetune.data.cache import DamagedCacheError, cache_path, read_cached, write_cached
from finetune.distributed import collectives
from finetune.distributed.collectives import all_gather_object, shard_padded
from finetune.distributed.rank import dist_info
from finetune.distributed.sharding import is_sharded, local_shard, reshard
from finetune.library_internals import attention_implementation, zero3_full_shape
from finetune.recipe.settings import StageSettings, TrainSettings
from finetune.training.context import RunContext
from finetune.training.loss import output_head
from finetune.training.model import Policy, preserve_state, unwrap_model

REFERENCE_CACHE_FORMAT = 2
"""Increased when the meaning of a cached file changes, so that old files are not read."""

TokenLogps = NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceLogps:
    """Reference log-probabilities from the initial policy; ``batch_size``: groups per forward pass."""

    ctx: RunContext[StageSettings]
    policy: Policy
    collator: PreferenceCollator
    batch_size: int

    def compute(self, groups: PreferenceGroups, rows: Sequence[int]) -> TokenLogps:
        """Return the token log-probabilities of some groups' completions."""
        with self.ctx.timed("reference"):
            if not self.ctx.settings.data.cache:
                return self._forward(groups, rows)
            path = reference_cache_file(self.policy.model, self._cache_key(rows), groups)
            # Rank 0 reads for all, so that all ranks agree on whether the cache has them.
            logps = collectives.broadcast_object(self._load_cached(path) if self.ctx.dist.is_main else None)
            if logps is not None:
                self.ctx.log(f"reference log-probabilities of {len(rows)} groups: cached")
                return logps
            logps = self._forward(groups, rows)
            if self.ctx.dist.is_main:
                write_cached(path, {"logps": logps}, {})
            return logps

    def _load_cached(self, path: Path) -> TokenLogps | None:
        """Return an earlier run's log-probabilities, None without them; a corrupt file is recomputed."""
        try:
            cached = read_cached(path)
        except DamagedCacheError as damage:
            self.ctx.log(f"corrupt reference cache, recomputing: {damage}")
            return None
        return None if cached is None else cached[0]["logps"]

    def _forward(self, groups: PreferenceGroups, rows: Sequence[int]) -> TokenLogps:
        model, started = self.policy.model, time.monotonic()
        with self._progress(len(rows)) as on_progress, autocast_for(model, self.policy.precision):
            logps = compute_reference_logps(
                model,
                groups,
                rows,
                collate=self.collator,
                batch_size=self.batch_size,
                on_progress=on_progress,
            )
        seconds = time.monotonic() - started
        self.ctx.log(
            f"reference log-probabilities of {len(rows)} groups: {seconds:.1f} s "
            f"({len(rows) / seconds:.1f} groups/s)"
        )
        return logps

    def _cache_key(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return what the log-probabilities depend on besides weights and tokens."""
        # Kernels round differently by device, attention implementation, batch layout and version.
        return {
            "rows": list(rows),
            "precision": self.policy.precision,
            "quantization": self.policy.quantization,
            "layout": asdict(self.collator),
            "attention": attention_implementation(unwrap_model(self.policy.model).config),
            "device": self.ctx.hardware.device,
            "versions": [torch.__version__, transformers.__version__],
        }

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar; a signal interrupts between two forward passes."""
        columns = (TextColumn("  reference"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = self.ctx.console
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=total)

            def on_progress(groups: int) -> None:
                bar.advance(task, groups)
                self.ctx.raise_if_interrupted("while computing reference log-probabilities")

            yield on_progress


def rows_seen_by_run(lengths: Sequence[int], train: TrainSettings, *, steps: int) -> list[int]:
    """Return the rows that the first optimizer steps of a run use, in ascending order.

    >>> train = TrainSettings(batch_size=2, seed=0, group_by_length=True)
    >>> rows_seen_by_run([5, 5, 5, 5, 5, 5], train, steps=1)
    [2, 3]
    """
    seed, group_by_length = train.seed, train.group_by_length
    epochs = (
        optimizer_batches(lengths, train.batch_size, seed=seed, epoch=epoch, group_by_length=group_by_length)
        for epoch in count()
    )
    batches = (batch for epoch in epochs for batch in epoch)
    used_rows: set[int] = set()
    for batch in islice(batches, steps):
        used_rows.update(batch)
        # Later epochs add no rows.
        if len(used_rows) == len(lengths):
            break
    return sorted(used_rows)


@torch.no_grad()
def compute_reference_logps(
    model: nn.Module,
    groups: PreferenceGroups,
    rows: Collection[int],
    *,
    collate: PreferenceCollator,
    batch_size: int,
    on_progress: Callable[[int], None],
) -> TokenLogps:
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
    offsets = completion_offsets(groups)
    logps_N = np.full(offsets[-1], np.nan, dtype=np.float32)
    head, device = output_head(model), next(model.parameters()).device
    data, group_lengths = PreferenceDataset(groups), groups.lengths
    # Longest first: similar lengths share a pass (little padding), and running out of memory shows at once.
    order = sorted(rows, key=lambda row: -group_lengths[row])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with preserve_state(model):
        for first in range(0, len(batches), dist_info().world_size):
            concurrent_batches = batches[first : first + dist_info().world_size]
            # One batch per process. In the last round it may repeat another rank's: with sharded weights all
            # ranks must run every forward pass.
            for batch_rows, _ in shard_padded(concurrent_batches):
                cpu_batch = collate([data[row] for row in batch_rows])
                batch = {name: value.to(device) for name, value in cpu_batch.items()}
                logps_CT, lengths_C = token_logps(model, head, batch).cpu(), batch["lengths"].tolist()
                batch_logps = torch.cat(
                    [values[:length] for values, length in zip(logps_CT, lengths_C, strict=True)]
                ).numpy()
                tokens_per_group = [int(offsets[row + 1] - offsets[row]) for row in batch_rows]
                for row, values in zip(
                    batch_rows, np.split(batch_logps, np.cumsum(tokens_per_group)[:-1]), strict=True
                ):
                    logps_N[offsets[row] : offsets[row + 1]] = values
            # In every rank after each round: the callback may be a collective (`raise_if_interrupted`).
            on_progress(sum(map(len, concurrent_batches)))
    # Each rank has NaN where it computed nothing; fmax takes the number of the two.
    merged: TokenLogps = np.fmax.reduce(all_gather_object(logps_N))
    return merged


def reference_cache_file(model: nn.Module, key: Mapping[str, Any], groups: PreferenceGroups) -> Path:
    """Return the cache file of reference log-probabilities, named by a digest of everything they depend on.

    Args:
        model: the policy before its first step: every weight of base and adapter.
        key: rows, precision, layout and versions, JSON-serializable.
        groups: the data: every token.
    """
    digest = hashlib.sha256(json.dumps([REFERENCE_CACHE_FORMAT, key], sort_keys=True).encode())
    for array in (groups.input_ids, groups.offsets, groups.prompt_index):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(model_digest(model).encode())
    return cache_path("reference", digest.hexdigest())


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model: weights, buffers, model config and adapter configs.

    A collective if the weights are sharded: the digest is that of all ranks' digests of their shards.
    """
    digest = hashlib.sha256()
    configs = [unwrap_model(model).config.to_dict()]
    if isinstance(model, PeftModel):
        configs += [config.to_dict() for config in model.peft_config.values()]
    digest.update(json.dumps(configs, sort_keys=True, default=_json_default).encode())
    reshard(model)
    # keep_vars: ZeRO-3's parameters are empty but for their shards, which only the parameter itself has.
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(value, Tensor):
            # The full shape: ZeRO-3's parameters are empty unless they happen to be gathered.
            digest.update(f"{name} {value.dtype} {tuple(zero3_full_shape(value))}".encode())
            shard = local_shard(value).detach().contiguous().cpu()
            # As bytes: NumPy has no bfloat16.
            digest.update(shard.reshape(-1).view(torch.uint8).numpy().data)
    if not is_sharded(model):
        return digest.hexdigest()
    return hashlib.sha256("".join(all_gather_object(digest.hexdigest())).encode()).hexdigest()


def _json_default(value: object) -> object:
    """Return a value that JSON lacks as text."""
    # Sets are sorted: their order follows Python's string hashes, which differ in every process.
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
