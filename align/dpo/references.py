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
from align.dpo.reference import (
    Logps,
    keep_reference,
    kept_reference,
    reference_file,
    reference_logps,
)
from align.preference.attention import unwrapped
from align.preference.rows.dataset import PreferenceGroups
from align.preference.starting_policy import arithmetic
from finetune.data.cache import DamagedCacheError
from finetune.training import processes
from finetune.training.job import Job
from finetune.training.loading import Policy


@dataclass(frozen=True)
class Reference:
    """Reference log-probabilities from the initial policy; ``batch_size``: groups per forward pass."""

    job: Job
    policy: Policy
    collator: PreferenceCollator
    size: int

    def of(self, groups: PreferenceGroups, rows: Sequence[int]) -> Logps:
        """Return the token log-probabilities of some groups' completions."""
        with self.job.timed("reference"):
            if not self.job.recipe.settings.data.cache:
                return self._computed(groups, rows)
            file = reference_file(self.policy.model, self._key(rows), groups)
            # Rank 0 reads for all, so that all ranks agree on whether the cache has them.
            found = processes.from_main(self._kept(file) if self.job.world.main else None)
            if found is not None:
                self.job.say(f"reference log-probabilities of {len(rows)} groups: cached")
                return found
            found = self._computed(groups, rows)
            if self.job.world.main:
                keep_reference(file, found)
            return found

    def _kept(self, file: Path) -> Logps | None:
        """Return the cached log-probabilities; a corrupt file is logged and recomputed."""
        try:
            return kept_reference(file)
        except DamagedCacheError as damage:
            self.job.say(f"corrupt reference cache, recomputing: {damage}")
            return None

    def _computed(self, groups: PreferenceGroups, rows: Sequence[int]) -> Logps:
        model, started = self.policy.model, time.monotonic()
        with self._progress(len(rows)) as done, arithmetic(model, self.policy.precision):
            found = reference_logps(model, groups, rows, collate=self.collator, size=self.size, done=done)
        seconds = time.monotonic() - started
        self.job.say(
            f"reference log-probabilities of {len(rows)} groups: {seconds:.1f} s "
            f"({len(rows) / seconds:.1f} groups/s)"
        )
        return found

    def _key(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return what the log-probabilities depend on besides weights and tokens."""
        # Kernels round differently by device, attention implementation, batch layout and version.
        return {
            "rows": list(rows),
            "precision": self.policy.precision,
            "quantization": self.policy.quantization,
            "layout": asdict(self.collator),
            "attention": unwrapped(self.policy.model).config._attn_implementation,
            "device": self.job.hardware.device,
            "versions": [torch.__version__, transformers.__version__],
        }

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar; a signal interrupts between two forward passes."""
        columns = (TextColumn("  reference"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = self.job.console
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=total)

            def done(groups: int) -> None:
                bar.advance(task, groups)
                self.job.stop_if_asked("while computing reference log-probabilities")

            yield done
