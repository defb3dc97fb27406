"""Progressive prompts: each task adds a trainable prompt before the frozen prompts of earlier tasks.

Razdaibiedina et al. 2023 (arXiv 2301.12314), section 3: for task k the model reads [P_k; P_(k-1); ...; P_1;
x] and only P_k is trained. Earlier prompts and the base are frozen, so there is no forgetting, and the new
task can use the earlier prompts. ``previous`` is the run of the previous task; without it this is the first
task, and the method is prompt tuning.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import prompt
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import VIRTUAL_TOKENS_NOT_MERGEABLE, Traits
from finetune.recipe.compatibility import Rule, caught
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import Dimension, NonEmptyStr, StageSettings, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False, merge_unsupported=VIRTUAL_TOKENS_NOT_MERGEABLE, learning_rate=1e-3
)  # as for `prompt`


class Settings(VirtualTokenSettings):
    """Length of the new prompt, and the previous run."""

    method: Literal["progressive_prompt"] = Field(
        "progressive_prompt", description="a new prompt before those of earlier tasks"
    )
    virtual_tokens: Dimension = Field(10, description="length of the new prompt")  # the paper, section 4: 10
    previous: NonEmptyStr | None = Field(
        None, description="run directory of the previous task; null: first task"
    )

    @property
    def positions(self) -> int:
        """Return the total number of virtual tokens of all prompts."""
        return self.virtual_tokens + (_num_earlier_tokens(self.previous) if self.previous else 0)


def _check_previous(settings: StageSettings) -> list[Problem]:
    adapter = settings.adapter
    assert isinstance(adapter, Settings)
    return [] if adapter.previous is None else caught(_num_earlier_tokens, adapter.previous)


RULES = (
    Rule(
        "progressive-prompt-previous",
        message="adapter.previous is a run with adapter prompt or progressive_prompt",
        source="arXiv 2301.12314, section 3",
        find=_check_previous,
        reads=("adapter",),
    ),
)


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a trainable prompt before the frozen ones.

    Raises:
        UserError: ``previous`` is not a run with a soft prompt, or its prompts have another width.
    """
    import torch
    from peft import PromptTuningConfig

    from finetune.adapters._prefix_encoders import ProgressivePrompt
    from finetune.adapters._prompt_model import prompt_model

    new_model = prompt.build(model, prompt.Settings(virtual_tokens=settings.virtual_tokens))
    new_prompt = new_model.prompt_encoder["default"].embedding.weight.detach()
    earlier_prompts = (
        _load_earlier_prompts(settings.previous) if settings.previous else torch.empty(0, new_prompt.shape[1])
    )
    if earlier_prompts.shape[1] != new_prompt.shape[1]:
        actual = f"'{settings.previous}' has prompts of width {earlier_prompts.shape[1]}"
        raise UserError(
            Problem("adapter.previous", actual, f"a run on this base (width {new_prompt.shape[1]})")
        )
    config = PromptTuningConfig(
        task_type=peft_task_type(model), num_virtual_tokens=len(new_prompt) + len(earlier_prompts)
    )
    adapted = prompt_model(model, config)
    adapted.prompt_encoder["default"] = ProgressivePrompt(new_prompt, earlier_prompts.to(new_prompt)).to(
        new_prompt.device
    )
    return adapted


def _num_earlier_tokens(previous: str) -> int:
    file = Path(previous) / "adapter" / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        actual = f"'{previous}' is not the folder of a finished run ({file.name} cannot be read)"
        expected = "the run directory of the previous task"
        raise UserError(Problem("adapter.previous", actual, expected, "`llm-align list runs`")) from error
    if config.get("peft_type") != "PROMPT_TUNING":
        actual = f"'{previous}' has an adapter of type {config.get('peft_type')}"
        raise UserError(
            Problem("adapter.previous", actual, "a run with adapter prompt or progressive_prompt")
        )
    return int(config["num_virtual_tokens"])


def _load_earlier_prompts(previous: str) -> "Tensor":
    from safetensors.torch import load_file

    _num_earlier_tokens(previous)
    prompts: Tensor = load_file(Path(previous) / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    return prompts
