"""Reference log-probabilities of a run: read from the cache, or computed with a progress bar and cached."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align.dpo.collate import PreferenceCollator
from align.dpo.reference_logps import (
    TokenLogps,
    cache_reference,
    compute_reference_logps,
    load_cached_reference,
    reference_cache_file,
)
from align.preference.attention import unwrap_model
from align.preference.reference_policy import autocast_for
from align.preference.rows.dataset import PreferenceGroups
from finetune.data.cache import DamagedCacheError
from finetune.distributed import collectives
from finetune.training.context import RunContext
from finetune.training.model import Policy


@dataclass(frozen=True)
class ReferenceLogps:
    """Reference log-probabilities from the initial policy; ``batch_size``: groups per forward pass."""

    ctx: RunContext
    policy: Policy
    collator: PreferenceCollator
    batch_size: int

    def compute(self, groups: PreferenceGroups, rows: Sequence[int]) -> TokenLogps:
        """Return the token log-probabilities of some groups' completions."""
        with self.ctx.timed("reference"):
            if not self.ctx.recipe.settings.data.cache:
                return self._forward(groups, rows)
            path = reference_cache_file(self.policy.model, self._cache_key(rows), groups)
            # Rank 0 reads for all, so that all ranks agree on whether the cache has them.
            logps = collectives.broadcast_object(self._load_cached(path) if self.ctx.dist.is_main else None)
            if logps is not None:
                self.ctx.log(f"reference log-probabilities of {len(rows)} groups: cached")
                return logps
            logps = self._forward(groups, rows)
            if self.ctx.dist.is_main:
                cache_reference(path, logps)
            return logps

    def _load_cached(self, path: Path) -> TokenLogps | None:
        """Return the cached log-probabilities; a corrupt file is logged and recomputed."""
        try:
            return load_cached_reference(path)
        except DamagedCacheError as damage:
            self.ctx.log(f"corrupt reference cache, recomputing: {damage}")
            return None

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
            "attention": unwrap_model(self.policy.model).config._attn_implementation,
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
