"""PEFT's soft prompts, for encoders whose parameters are more than the prompt that they make.

PEFT saves the prompt alone. That is right for use and too little for going on with training, so these models
write the encoder's own parameters beside it, and read them back when a checkpoint is loaded.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ENCODER_WEIGHTS = "prompt_encoder.safetensors"


class PromptModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A base with a prompt encoder that can be saved in the middle of training."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write the adapter in PEFT's format, and the encoder's parameters beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        weights = {name: weight.contiguous() for name, weight in self._encoder.state_dict().items()}
        save_file(weights, Path(save_directory) / ENCODER_WEIGHTS)

    def load_adapter(
        self, model_id: str, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint of this adapter; any other adapter is loaded as PEFT does it."""
        file = Path(model_id) / ENCODER_WEIGHTS
        if is_trainable and adapter_name in self.peft_config and file.is_file():
            return self._encoder.load_state_dict(load_file(file))
        return super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)

    @property
    def _encoder(self) -> nn.Module:
        encoder: nn.Module = self.prompt_encoder[self.active_adapter]
        return encoder


class SingleTaskModel(PromptModel):
    """A base with a multi-task prompt of which one task is used."""

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the prompts of task 0, where PEFT would ask for the task of each row."""
        if task_ids is None:
            task_ids = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        prompts: Tensor = super().get_prompt(batch_size, task_ids, *args, **kwargs)
        return prompts
