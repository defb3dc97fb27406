"""Silence lines of libraries that require no action from the user."""

import logging
import re
import warnings

FOREIGN_LINES = {
    # A kernel for AVX512 that nobody has to install.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Also in runs without DeepSpeed: Accelerate imports it wherever it is installed.
    "DeepSpeed": "Setting accelerator to CPU",
    # Of checkpoints that were written at the same time: their numbers give the order.
    "transformers.trainer_utils": "mtime may not be reliable",
}
"""Logger -> start of a line that concerns no run."""
FOREIGN_WARNINGS = (
    # transformers' name for it in its next major version, and PEFT uses the one of today.
    "`is_gradient_checkpointing` is deprecated",
    # Prompt tuning: PEFT numbers the positions itself.
    "Position ids are not supported for parameter efficient",
    # PEFT corrects it itself.
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
    # Adapters of `embed_tokens` or `lm_head`: the weights are saved, `llm-align merge` unties them.
    "Setting `save_embedding_layers` to `True`",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
)
"""Starts of the texts of warnings that concern no run."""
NOISY_LIBRARIES = (
    "bitsandbytes",
    "transformers",
    "datasets",
    "httpx",
    "httpx2",
    "torch.distributed.elastic",
)
"""Loggers that a program of ours sets to ERROR."""
FILTERED_LOGGERS = ("DeepSpeed", "transformers.trainer_utils")
"""Loggers whose level the library's import sets."""


class _ForeignLine(logging.Filter):
    """Drops the lines of a logger that begin with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def filter_foreign_lines() -> None:
    """Drop the lines that concern no run; in a user's program, whose other warnings stay visible.

    Call before the first of the libraries is imported: they print while that happens.
    """
    for name, start in FOREIGN_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(item, _ForeignLine) for item in logger.filters):
            logger.addFilter(_ForeignLine(start))
    for text in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(text))


def silence_libraries() -> None:
    """Leave only errors of the libraries, in a program of ours; call before the first of them is imported."""
    filter_foreign_lines()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    # By name: a logger can be configured before its library is imported.
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    # A filter and not a level: DeepSpeed warns while it is imported, after it has set its own level.
    for name in FILTERED_LOGGERS:
        logging.getLogger(name).addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
