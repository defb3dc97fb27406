"""PEFT prompt-learning models that also save their prompt encoder's parameters.

PEFT saves only the computed prompt. That is enough for inference but not to resume training, so these models
also save the encoder's parameters, and restore them when a checkpoint is loaded.
"""

from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters._task import SEQ_CLS

ENCODER_WEIGHTS_FILE = "prompt_encoder.safetensors"
PROMPT_WEIGHTS_FILE = "adapter_model.safetensors"
PROMPT_KEY = "prompt_embeddings"
"""Key of the computed prompt in PEFT's file."""


class _SavesPromptEncoder(PeftModel):  # type: ignore[misc]
    """A base with a prompt encoder whose training can be resumed from its files."""

    def save_pretrained(
        self, save_directory: str, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the adapter in PEFT's format, and the encoder's parameters in a second file."""
        # Before super(), which runs the encoder: after its forward pass ZeRO-3 shards the weights again.
        # Copies, since safetensors refuses tensors that share memory.
        weights = {name: weight.clone().contiguous() for name, weight in self._encoder.state_dict().items()}
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            save_file(weights, Path(save_directory) / ENCODER_WEIGHTS_FILE)

    def load_adapter(
        self, model_id: str, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint of this adapter; other adapters are loaded by PEFT."""
        file = Path(model_id) / ENCODER_WEIGHTS_FILE
        # To resume only: inference needs the computed prompt alone, which PEFT loads.
        if is_trainable and adapter_name in self.peft_config and file.is_file():
            self._load_head(load_file(Path(model_id) / PROMPT_WEIGHTS_FILE))
            return self._encoder.load_state_dict(load_file(file))
        return super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)

    @torch.no_grad()
    def _load_head(self, saved: dict[str, Tensor]) -> None:
        """Load what is saved besides the prompt: the score head of a reward model."""
        current = get_peft_model_state_dict(self)
        # The encoder computes the prompt, so the saved prompt itself is not loaded.
        for name, value in saved.items():
            if name != PROMPT_KEY:
                current[name].copy_(value)

    @property
    def _encoder(self) -> nn.Module:
        encoder: nn.Module = self.prompt_encoder[self.active_adapter]
        return encoder


class _SingleTask(_SavesPromptEncoder):
    """A base with a multi-task prompt, fixed to a single task."""

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the prompts of task 0; PEFT would require task ids for each row."""
        if task_ids is None:
            task_ids = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        prompts: Tensor = super().get_prompt(batch_size, task_ids, *args, **kwargs)
        return prompts


class PromptModel(_SavesPromptEncoder, PeftModelForCausalLM):  # type: ignore[misc]
    """A causal LM with a prompt encoder."""


class PromptScorer(_SavesPromptEncoder, PeftModelForSequenceClassification):  # type: ignore[misc]
    """A sequence classification model with a prompt encoder."""


class SingleTaskModel(_SingleTask, PeftModelForCausalLM):  # type: ignore[misc]
    """A causal LM with a single task's prompt."""


class SingleTaskScorer(_SingleTask, PeftModelForSequenceClassification):  # type: ignore[misc]
    """A sequence classification model with a single task's prompt."""


def prompt_model(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Return a base with a prompt encoder, of class according to ``config.task_type``."""
    return PromptScorer(model, config) if config.task_type == SEQ_CLS else PromptModel(model, config)


def single_task_model(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Return a base with a single task's prompt, of class according to ``config.task_type``."""
    return SingleTaskScorer(model, config) if config.task_type == SEQ_CLS else SingleTaskModel(model, config)
