"""Which modules an adapter may sit on."""

from typing import TYPE_CHECKING

from finetune.recipe.errors import Problem, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def linear_names(model: "PreTrainedModel") -> list[str]:
    """Return the last names of the model's linear layers (quantized ones too), the output head left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = [
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    return list(dict.fromkeys(names))


def check_targets(model: "PreTrainedModel", target: str | list[str]) -> None:
    """Raise UserError when a target ends no linear layer's name; the message lists the names that exist.

    A target matches a module whose full name is it or ends with ``.`` and it, as in PEFT.
    """
    if target == ALL_LINEAR:
        return
    modules = [name for name, _ in model.named_modules()]
    missing = [t for t in target if not any(name == t or name.endswith(f".{t}") for name in modules)]
    if missing or not target:
        names = linear_names(model)
        found = f"no module of {type(model).__name__} is named {', '.join(map(repr, missing))}" if missing else "[]"
        raise UserError(
            Problem("adapter.target", found, f"all-linear, or some of: {', '.join(names)}", nearest((missing or [""])[0], names))
        )
