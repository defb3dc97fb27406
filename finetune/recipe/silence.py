"""Silence library warnings that require no action from the user."""

import logging
import warnings

NOISY_LIBRARIES = (
    "bitsandbytes",
    "transformers",
    "datasets",
    "httpx",
    "torch.distributed.elastic",
)
"""Loggers set to ERROR."""
DEEPSPEED = "DeepSpeed"
"""DeepSpeed's logger, whose level its import sets to WARNING."""


def silence_libraries() -> None:
    """Set the libraries' loggers to ERROR and filter warnings; call before the first of them is imported."""
    # By name: a logger can be configured before its library is imported.
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    # A filter and not a level, because DeepSpeed warns while it is imported, after it has set its own level.
    logging.getLogger(DEEPSPEED).addFilter(_is_error)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
