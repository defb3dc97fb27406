"""How a run is started from Python, and its result: its files as Python objects."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from finetune.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback


Callbacks = Sequence["TrainerCallback | type[TrainerCallback]"]
"""A user's callbacks of the trainer: objects or classes."""


class RunOptions(TypedDict):
    """How a run is started, besides its recipe."""

    accept_changed_code: bool
    command: str
    callbacks: Callbacks
    finish: bool


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        directory: the run directory.
        record: content of run.json.
        metrics: one entry per logged step.
        samples: one entry per prompt, with the replies before and after training.
    """

    directory: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def adapter(self) -> Path:
        """Return the folder of the adapter (for PEFT), or of the model after full fine-tuning."""
        folder = self.directory / "adapter"
        return folder if folder.is_dir() else self.directory / "model"

    def load(self) -> "tuple[nn.Module, PreTrainedTokenizerBase]":
        """Return model and tokenizer, ready for ``model.generate``; ``load_tuned`` has the template too.

        Raises:
            UserError: the model is a reward model, or the run is not finished.
        """
        # torch is imported here: a finished run is returned without it.
        from finetune.training.loaded_model import load_for_generation

        loaded = load_for_generation(self.directory)
        return loaded.model, loaded.encoder.tokenizer

    @classmethod
    def of(cls, run: RunDirectory) -> "Result":
        """Read the directory of a finished run."""
        return cls(run.path, run.record, run.metrics(), run.samples())
