"""What an adapter declares beside its settings: what it goes with, and what it does while it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IN_THE_INPUT = "virtual tokens stand in the input: no weight of the base can hold them"


NO_HEAD = "PEFT's record of it has no room for a trained head, so that what is saved could not score"


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts about an adapter.

    Attributes:
        quantization: how its base may be stored; the first one is what ``model.quantization: auto`` means.
        packing: whether rows may be laid end to end (virtual tokens in front of a row forbid it).
        whole_model: whether it trains the base's own weights, so that the result is a model and no adapter.
        changes_base: whether building it changes the frozen weights (their sum with the adapter stays).
        checkpointing: whether it works with ``train.gradient_checkpointing``.
        merge: empty, or why the adapter cannot be folded into the base's weights.
        scores: empty, or why it cannot adapt a model that scores (a reward model).
        engines: the engines that can train it.
        learning_rate: a usual one, told when the command line changes a recipe's adapter but not its rate.
        in_training: settings that act in training alone, which a run that goes on from another may change.
        at_start: settings that only say how it begins, of no use to a run that goes on from another.
        goes_on_as: the adapter that trains on what this one has saved, where that is another.
    """

    quantization: tuple[str, ...] = ("none", "nf4", "int8")
    packing: bool = True
    whole_model: bool = False
    changes_base: bool = False
    checkpointing: bool = True
    merge: str = ""
    scores: str = ""
    engines: tuple[str, ...] = ("native", "trl")
    learning_rate: float = 2e-4  # QLoRA (arXiv 2305.14314), table 9
    in_training: tuple[str, ...] = ()
    at_start: tuple[str, ...] = ()
    goes_on_as: str = ""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What an adapter does while it trains, beyond its forward pass; the native engine calls these.

    Attributes:
        rate_factors: parameter name -> factor of the learning rate.
        penalty: added to the loss of each optimizer step.
        passes: forward passes of each batch; with 2 their predictions are pulled together (AdaMix).
        after_step: called with the number of steps done, after the optimizer, before gradients are cleared.
        state: tensors that a checkpoint must hold beside the weights.
        restore: takes what ``state`` gave.
    """

    rate_factors: Mapping[str, float] = field(default_factory=dict)
    penalty: "Callable[[], Tensor] | None" = None
    passes: int = 1
    after_step: Callable[[int], None] | None = None
    state: "Callable[[], dict[str, Tensor]] | None" = None
    restore: "Callable[[dict[str, Tensor]], None] | None" = None
