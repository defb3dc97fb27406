"""Silence library warnings that require no action from the user."""

import logging
import warnings

NOISY_LIBRARIES = (
    "bitsandbytes",
    "transformers",
    "datasets",
    "httpx",
    "DeepSpeed",
    "torch.distributed.elastic",
)
"""Loggers set to ERROR."""


def silence_libraries() -> None:
    """Set the libraries' loggers to ERROR and filter warnings; call before the first of them is imported."""
    # By name: a logger can be configured before its library is imported.
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient")
