"""Adapter traits (what it is compatible with) and training hooks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VIRTUAL_TOKENS_NOT_MERGEABLE = "virtual tokens are part of the input and cannot be merged into base weights"


SCORE_HEAD_NOT_SAVED = "PEFT cannot save a trained score head with it"


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties of an adapter.

    Attributes:
        quantization: supported quantizations of the base; the first is the value of
            ``model.quantization: auto``.
        packing: whether rows may be packed (virtual tokens before each row rule it out).
        full_finetuning: whether it trains the base's own weights, so that the result is a full model.
        changes_base: whether building it changes the frozen weights (their sum with the adapter stays).
        gradient_checkpointing: whether it supports ``train.gradient_checkpointing``.
        merge_unsupported: empty, or why the adapter cannot be merged into the base's weights.
        scoring_unsupported: empty, or why it cannot adapt a reward model.
        engines: the engines that can train it.
        learning_rate: typical learning rate, suggested when only the adapter of a recipe is changed.
        training_only: settings that only affect training; a run that continues another may change them.
        init_only: settings that only affect initialization; ignored when a run continues another.
        continues_as: the adapter to continue training with, if it is another one than this.
        depends_on_steps: whether it has a schedule over all steps, so that a run cannot be trained longer.
    """

    quantization: tuple[str, ...] = ("none", "nf4", "int8")
    packing: bool = True
    full_finetuning: bool = False
    changes_base: bool = False
    gradient_checkpointing: bool = True
    merge_unsupported: str = ""
    scoring_unsupported: str = ""
    engines: tuple[str, ...] = ("native", "trl")
    learning_rate: float = 2e-4  # QLoRA (arXiv 2305.14314), table 9
    training_only: tuple[str, ...] = ()
    init_only: tuple[str, ...] = ()
    continues_as: str = ""
    depends_on_steps: bool = False


@dataclass(frozen=True, slots=True)
class Hooks:
    """Training hooks of an adapter, called by the native engine.

    Attributes:
        lr_factors: parameter name -> learning rate factor (LoRA+).
        penalty: term added to the loss of each optimizer step (AdaLoRA's orthogonality penalty).
        forward_passes: forward passes per batch; 2 adds a consistency loss between them (AdaMix).
        after_step: called with the number of completed steps, after the optimizer step and before zero_grad.
        state: returns tensors to checkpoint besides the weights.
        restore: restores what ``state`` returned.
    """

    lr_factors: Mapping[str, float] = field(default_factory=dict)
    penalty: "Callable[[], Tensor] | None" = None
    forward_passes: int = 1
    after_step: Callable[[int], None] | None = None
    state: "Callable[[], dict[str, Tensor]] | None" = None
    restore: "Callable[[dict[str, Tensor]], None] | None" = None
