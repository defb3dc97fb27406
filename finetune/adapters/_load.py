"""Load a saved adapter of any kind, PEFT's or ours."""

from pathlib import Path

from peft import MultitaskPromptTuningConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from finetune.adapters import _bias_layer, _bottleneck_layer
from finetune.adapters._prompt_model import single_task_model

CUSTOM_TUNERS = (_bias_layer, _bottleneck_layer)
"""Importing these registers our adapter types with PEFT."""


def load_saved_adapter(base: PreTrainedModel, path: Path) -> PeftModel:
    """Load a saved adapter onto a base, for inference.

    Adapters of PEFT's own types also load with plain ``PeftModel.from_pretrained``.
    """
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, MultitaskPromptTuningConfig):
        return PeftModel.from_pretrained(base, str(path))
    # Random: the weights are loaded below, and the run with the source prompt may no longer exist.
    config.prompt_tuning_init, config.inference_mode = "RANDOM", True
    model = single_task_model(base, config)
    model.load_adapter(str(path), "default")
    return model
