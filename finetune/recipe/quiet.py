"""Libraries kept to errors: most of their warnings ask nothing of our users."""

import logging
import warnings

NOISY = ("bitsandbytes", "transformers", "datasets", "httpx", "DeepSpeed", "torch.distributed.elastic")
"""Libraries whose warnings ask nothing of our users."""


def quiet() -> None:
    """Keep the libraries to errors; call it before the first of them is imported."""
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient")
