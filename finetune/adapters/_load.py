"""Opening a saved adapter, ours and PEFT's alike."""

from pathlib import Path

from peft import MultitaskPromptTuningConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from finetune.adapters import _bias_layer, _bottleneck_layer
from finetune.adapters._prompt_model import single_task_model

OURS = (_bias_layer, _bottleneck_layer)
"""Importing these makes our kinds of adapters known to PEFT."""


def open_adapter(base: PreTrainedModel, path: Path) -> PeftModel:
    """Return a base with the adapter of a folder, for use and not for training.

    Adapters of PEFT's own kinds open with plain ``PeftModel.from_pretrained`` as well.
    """
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, MultitaskPromptTuningConfig):
        return PeftModel.from_pretrained(base, str(path))
    config.prompt_tuning_init, config.inference_mode = "RANDOM", True
    model = single_task_model(base, config)
    model.load_adapter(str(path), "default")
    return model
