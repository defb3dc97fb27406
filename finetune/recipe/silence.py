"""Silence library warnings that require no action from the user."""

import logging
import warnings

NOISY_LIBRARIES = (
    "bitsandbytes",
    "transformers",
    "datasets",
    "httpx",
    "httpx2",
    "torch.distributed.elastic",
)
"""Loggers set to ERROR."""
FILTERED_LOGGERS = ("DeepSpeed", "transformers.trainer_utils")
"""Loggers whose level the library's import sets. DeepSpeed warns of a machine without a GPU, transformers of
checkpoints that were written at the same time."""


def silence_libraries() -> None:
    """Set the libraries' loggers to ERROR and filter warnings; call before the first of them is imported."""
    # By name: a logger can be configured before its library is imported.
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    # A filter and not a level: DeepSpeed warns while it is imported, after it has set its own level.
    for name in FILTERED_LOGGERS:
        logging.getLogger(name).addFilter(_is_error)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
