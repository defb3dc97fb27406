"""Which modules an adapter may sit on."""

from typing import TYPE_CHECKING, Final

from finetune.recipe.errors import Problem, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR: Final = "all-linear"


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
    """Tell targets that no layer answers to, before PEFT meets them.

    A target matches a layer whose full name is it or ends with ``.`` and it, as in PEFT. Linear layers (the
    head too) and embeddings can carry an adapter.

    Raises:
        UserError: a target names no such layer; the message lists the linear layers that exist.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if target == ALL_LINEAR:
        return
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    missing = [
        word for word in target if not any(name == word or name.endswith(f".{word}") for name in layers)
    ]
    if missing:
        names = linear_names(model)
        found = f"no linear layer of {type(model).__name__} is named {' or '.join(map(repr, missing))}"
        expected = f"all-linear, or a list of some of: {', '.join(names)}"
        raise UserError(Problem("adapter.target", found, expected, nearest(missing[0], names)))
