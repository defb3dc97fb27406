"""What an adapter declares beside its settings, so that contradictions are told before anything is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts about an adapter.

    Attributes:
        quantization: how its base may be stored; the first one is what ``model.quantization: auto`` means.
        packing: whether rows may be laid end to end (virtual tokens in front of a row forbid it).
        virtual_tokens: whether it puts tokens of its own in front of each sequence.
        whole_model: whether it trains the base's own weights, so that the result is a model and no adapter.
        learning_rate: a usual one, told when the command line changes a recipe's adapter but not its rate.
    """

    quantization: tuple[str, ...] = ("none", "nf4", "int8")
    packing: bool = True
    virtual_tokens: bool = False
    whole_model: bool = False
    learning_rate: float = 2e-4  # QLoRA (arXiv 2305.14314), table 9
