"""What a finished run gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Result:
    """A run's folder and what it says: record (run.json), metrics (one entry a logged step), samples."""

    directory: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def adapter(self) -> Path:
        """Return the folder that PEFT loads, or the model's where the whole model was tuned."""
        folder = self.directory / "adapter"
        return folder if folder.is_dir() else self.directory / "model"

    @classmethod
    def of(cls, run: RunDirectory) -> "Result":
        """Read a finished run's folder."""
        return cls(run.path, run.record, run.metrics(), run.samples())
