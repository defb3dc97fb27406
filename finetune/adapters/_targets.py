"""Target modules of adapters: find and validate their names."""

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.settings import NonEmptyStr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR: Final = "all-linear"
FEED_FORWARD_OUTPUT: Final = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
"""Common names of the output layer of the feed-forward block."""

FUSED_MAMBA = ("out_proj", "conv1d")
UNCALLED_LAYERS = {
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), FUSED_MAMBA
    ),
    **dict.fromkeys(("mamba", "falcon_mamba"), (*FUSED_MAMBA, "dt_proj")),
    "jamba": ("dt_proj",),
    "gemma3n_text": ("correction_coefs",),
}
"""Layers by model type whose weights a fused kernel or the model reads without calling them: an adapter has
no effect there (transformers 5.23, ``models/*/modeling_*.py``)."""
ROUTER_CLASSES = ("Router", "GroupedLinear")
"""Ends of the class names of subclasses of ``nn.Linear`` that return several tensors, or take groups."""

Target = Literal["all-linear"] | Annotated[list[NonEmptyStr], Field(min_length=1)]


def linear_module_names(model: "PreTrainedModel") -> list[str]:
    """Return the module names of the model's linear layers (also quantized ones), without the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    # A layer of a ModuleList has a number as its name, which other lists have too: it needs the list's name.
    parts = (name.rsplit(".", 2) for name in names)
    return list(dict.fromkeys(".".join(part[-2:]) if part[-1].isdigit() else part[-1] for part in parts))


def resolve_targets(model: "PreTrainedModel", target: Target, *, lora: bool = False) -> Target:
    """Return ``target_modules`` for PEFT: only layers that compute a plain linear map.

    Args:
        model: the base.
        target: the recipe's ``adapter.target``.
        lora: whether PEFT's LoRA adapts them, which moves some names to the fused experts of a mixture.

    Raises:
        UserError: a target matches no layer, or PEFT would adapt fused experts in its place.
    """
    from finetune.adapters._task import SEQ_CLS, peft_task_type
    from finetune.library_internals import names_moved_to_experts

    check_targets(model, target)
    kind = model.config.model_type
    moved = names_moved_to_experts(kind) if lora else frozenset()
    if target != ALL_LINEAR:
        if refused := sorted({name.rsplit(".", 1)[-1] for name in target} & moved):
            actual = f"in a model of type '{kind}' PEFT replaces {', '.join(refused)} by the fused experts"
            expected = "layers outside of the experts, which cannot be adapted"
            raise UserError(Problem("adapter.target", actual, expected, "adapter.target=all-linear"))
        return target
    names = linear_module_names(model)
    excluded = {*moved, *_router_names(model), *UNCALLED_LAYERS.get(kind, ())}
    if model.config.get_text_config() is not model.config:
        return _text_layers(model, excluded)
    # PEFT finds the layers itself, unless it would find others too.
    if not moved and not excluded & set(names):
        return target
    excluded |= {"score"} if peft_task_type(model) == SEQ_CLS else set()
    return [name for name in names if name not in excluded]


def _text_layers(model: "PreTrainedModel", excluded: set[str]) -> list[str]:
    """Return the full names of the linear layers of the text model inside a model of images or audio."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = set(linear_module_names(decoder)) - excluded
    return [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if name.rsplit(".", 1)[-1] in linear and not list(module.children())
    ]


def _router_names(model: "PreTrainedModel") -> set[str]:
    """Return the names of layers that are linear by their class, but route or group their inputs."""
    from torch import nn

    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__name__.endswith(ROUTER_CLASSES)
    }


def check_targets(model: "PreTrainedModel", target: str | list[str]) -> None:
    """Check that every target matches a layer.

    As in PEFT, a target matches a layer whose full name equals it or ends with ``.target``. Linear layers
    (also the head) and embeddings are supported.

    Raises:
        UserError: a target matches no layer; the message lists the model's linear layers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if target == ALL_LINEAR:
        return
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    missing = [
        name_suffix
        for name_suffix in target
        if not any(name == name_suffix or name.endswith(f".{name_suffix}") for name in layers)
    ]
    if missing:
        names = linear_module_names(model)
        actual = f"no linear layer of {type(model).__name__} is named {' or '.join(map(repr, missing))}"
        expected = f"all-linear, or a list of some of: {', '.join(names)}"
        raise UserError(Problem("adapter.target", actual, expected, did_you_mean(missing[0], names)))


def find_module_names(
    model: "PreTrainedModel", candidates: tuple[str, ...], *, part: str, linear: bool = True
) -> list[str]:
    """Return the names among ``candidates`` that the model's linear layers (or any of its modules) have.

    Raises:
        UserError: none of them exists; ``part`` names the searched part in the message.
    """
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    existing = set(linear_module_names(model)) if linear else modules
    matches = [name for name in candidates if name in existing]
    if not matches:
        text = f"found no layer of {type(model).__name__} with a known name of {part}"
        repair = "adapter.method=lora works on any model: set adapter.target to its layers"
        raise UserError(Problem("adapter.method", text, f"one of {', '.join(candidates)}", repair))
    return matches


def norm_module_names(model: "PreTrainedModel") -> list[str]:
    """Return the module names of the model's norm layers with weights.

    Raises:
        UserError: there are none.
    """
    # By the class's name: most families define an RMSNorm class of their own.
    norms = [
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and next(module.parameters(), None) is not None
    ]
    if not norms:
        text = f"{type(model).__name__} has no norm layer with weights"
        raise UserError(
            Problem("adapter.method", text, "a model whose norm layers have weights", "adapter.method=lora")
        )
    return list(dict.fromkeys(norms))
