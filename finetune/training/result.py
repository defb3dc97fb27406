"""Result of a finished run: folder, record, metrics, samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Result:
    """A run's folder, record (run.json), metrics (one entry per logged step) and samples."""

    directory: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def adapter(self) -> Path:
        """Return the adapter's folder for PEFT, or the model's after full fine-tuning."""
        folder = self.directory / "adapter"
        return folder if folder.is_dir() else self.directory / "model"

    @classmethod
    def of(cls, run: RunDirectory) -> "Result":
        """Read a finished run's folder."""
        return cls(run.path, run.record, run.metrics(), run.samples())
