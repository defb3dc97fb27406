r"""Multitask prompt tuning: a shared prompt, adapted to a task by a rank-one matrix.

Wang et al. 2023 (arXiv 2303.02861), equation 1: P_k = P* o (u_k v_k^T). Here for one task at a time, the
paper's transfer to a target task: ``source`` is a run whose shared prompt P* is the initial value (the paper
trains it on many tasks; our ``data.mix`` mixes them).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import VIRTUAL_TOKENS_NOT_MERGEABLE, Traits
from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Dimension, NonEmptyStr, StageSettings, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False, merge_unsupported=VIRTUAL_TOKENS_NOT_MERGEABLE, learning_rate=1e-1, init_only=("source",)
)  # 1e-1: the product and its gradient are near zero initially; the paper uses 0.3 (section 4.1)


class Settings(VirtualTokenSettings):
    """Prompt length, rank, and source of the shared prompt."""

    method: Literal["multitask_prompt"] = Field(
        "multitask_prompt", description="a shared prompt times a rank-one matrix"
    )
    virtual_tokens: Dimension = Field(100, description="length of the prompt")  # the paper, section 4.1
    rank: Dimension = Field(1, description="rank of the task matrix")  # equation 1
    source: NonEmptyStr | None = Field(
        None, description="run directory with the shared prompt; null: random tokens"
    )


def _check_source(settings: StageSettings) -> Iterator[Problem]:
    adapter = settings.adapter
    assert isinstance(adapter, Settings)
    if adapter.source is not None and not _shared_prompt_file(adapter.source).is_file():
        actual = f"'{adapter.source}' has no adapter"
        yield Problem("adapter.source", actual, "the run directory of a multitask_prompt run")


RULES = (
    Rule(
        "multitask-prompt-source",
        message="adapter.source is a run with a shared prompt",
        source="arXiv 2303.02861, equation 1",
        find=_check_source,
        reads=("adapter",),
    ),
)


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a shared prompt and a task matrix."""
    from peft import MultitaskPromptTuningConfig, MultitaskPromptTuningInit

    from finetune.adapters._prompt_model import single_task_model

    init = (
        MultitaskPromptTuningInit.ONLY_SOURCE_SHARED if settings.source else MultitaskPromptTuningInit.RANDOM
    )
    config = MultitaskPromptTuningConfig(
        task_type=peft_task_type(model),
        num_virtual_tokens=settings.virtual_tokens,
        num_ranks=settings.rank,
        num_tasks=1,
        prompt_tuning_init=init,
        prompt_tuning_init_state_dict_path=str(_shared_prompt_file(settings.source))
        if settings.source
        else None,
    )
    return single_task_model(model, config)


def _shared_prompt_file(source: str) -> Path:
    return Path(source) / "adapter" / "adapter_model.safetensors"
