"""Load what a recipe names: tokenizer and data first (cheap, and where most mistakes are), then the model."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, set_seed

from finetune.data.dataset import PreparedData
from finetune.data.documents import prepare_data
from finetune.distributed import collectives, sharding
from finetune.distributed.solver import LaunchTarget, refuse_incompatible
from finetune.distributed.strategies import ZERO_STAGES
from finetune.recipe.base_config import stored_quantization
from finetune.recipe.checkpoint_folder import adapter_folder
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.rules import check_batch_divides
from finetune.recipe.settings import ModelSettings
from finetune.training import auto_values
from finetune.training.architectures import mask_unsupported
from finetune.training.context import RunContext
from finetune.training.model import (
    Policy,
    TextEncoding,
    attach_adapter,
    build_text_encoding,
    load_base,
    load_config,
)
from finetune.training.resume_adapter import load_adapter_weights


@dataclass(frozen=True)
class FrozenBase:
    """A base without adapter, the precision of its forward pass, and its quantization."""

    base: PreTrainedModel
    precision: str
    quantization: str


def init_distributed(ctx: RunContext) -> None:
    """Resolve the strategy and initialize the process group; called before a model is loaded."""
    train, world_size = ctx.settings.train, ctx.dist.world_size
    ctx.strategy = ctx.resolve_auto("train.strategy", auto_values.strategy(train.strategy, world_size))
    if train.num_processes != world_size:
        count, reason = auto_values.num_processes("auto", ctx.hardware)
        ctx.resolve_auto(
            "train.num_processes", (world_size, reason if world_size == count else "set by the launcher")
        )
    collectives.init_distributed(ctx.hardware.device, deepspeed=ctx.strategy in ZERO_STAGES)


def shard_on_load(ctx: RunContext, dtype: str) -> None:
    """Load models sharded until training begins (ZeRO-3); FSDP2 shards in ``from_pretrained``."""
    if ctx.strategy == "zero3":
        ctx.loading_contexts.enter_context(
            sharding.zero3_init(dtype, offload=ctx.settings.train.offload, folder=ctx.run.path)
        )


def enable_sharded_inference(ctx: RunContext, model: nn.Module, base: PreTrainedModel) -> None:
    """Allow forward passes of a ZeRO-3 model until its trainer takes over."""
    if ctx.strategy == "zero3":
        ctx.loading_contexts.enter_context(
            sharding.zero3_inference_engine(
                model, base, offload=ctx.settings.train.offload, folder=ctx.run.path
            )
        )


def load_text_encoding(ctx: RunContext) -> TextEncoding:
    """Load tokenizer and template.

    Raises:
        UserError: settings that are incompatible here, steps of TRL that would not hold ``train.batch_size``
            rows, no such base, no EOS, no chat template, or ``max_length`` exceeds the model's positions.
    """
    settings = ctx.settings
    target = LaunchTarget(ctx.hardware.device, ctx.hardware.bfloat16, ctx.dist.world_size)
    refuse_incompatible(ctx.recipe, target)  # before anything is loaded
    if settings.train.engine == "trl":
        micro_batch_size = settings.train.micro_batch_size
        # 1 divides all: what `auto` becomes depends on the rows.
        rows = 1 if micro_batch_size == "auto" else micro_batch_size
        check_batch_divides(settings.train.batch_size, rows, target.processes)
    text, reason = build_text_encoding(settings)
    if settings.data.packing:
        _refuse_unpackable(settings.model)
    ctx.resolve_auto("data.max_length", (text.max_length, reason))
    return text


def _refuse_unpackable(settings: ModelSettings) -> None:
    """Raise UserError if the base's architecture mixes the rows that are packed together."""
    if reason := mask_unsupported(load_config(settings)):
        expected = "false for this base: rows that are packed together would see each other"
        repair = "data.packing=false (rows are batched by length anyway)"
        raise UserError(Problem("data.packing", f"true, but {reason}", expected, repair))


def load_data(ctx: RunContext, text: TextEncoding) -> PreparedData:
    """Read and tokenize the recipe's data, and log the data report.

    Raises:
        UserError: the data are invalid; the message gives file, line and field.
    """
    settings = ctx.settings
    with ctx.timed("data"):
        data = prepare_data(settings.data, text.encoder, max_length=text.max_length, seed=settings.train.seed)
    for line in data.report.lines():
        ctx.log(line)
    return data


def parent_adapter_run(settings: ModelSettings) -> Path | None:
    """Return the run whose adapter is trained further; None without one, or if its full model is the base."""
    parent = Path(settings.init_from) if settings.init_from is not None else None
    return parent if parent is not None and adapter_folder(parent).is_dir() else None


def load_policy(ctx: RunContext) -> Policy:
    """Load the base and add the adapter: the parent run's, or a new one initialized with the seed.

    Raises:
        UserError: the base cannot be loaded, the adapter does not fit it, or the parent's files are corrupt.
    """
    return add_adapter(ctx, load_frozen_base(ctx))


def load_frozen_base(ctx: RunContext) -> FrozenBase:
    """Load the base in the precision and quantization that its adapter needs.

    Raises:
        UserError: the base cannot be loaded.
    """
    settings = ctx.settings
    traits = adapter_traits(settings.adapter.method)
    init_distributed(ctx)
    precision = ctx.resolve_auto(
        "model.precision", auto_values.precision(settings.model.precision, ctx.hardware)
    )
    quantization = ctx.resolve_auto(
        "model.quantization", resolve_quantization(settings.model, traits.quantization)
    )
    # Trained weights are float32 master weights (mixed precision); frozen ones have the compute dtype.
    dtype = "float32" if traits.full_finetuning else precision
    with ctx.timed("load"):
        set_seed(settings.train.seed)
        shard_on_load(ctx, dtype)
        base = load_base(
            settings.model,
            precision=dtype,
            quantization=quantization,
            hardware=ctx.hardware,
            strategy=ctx.strategy,
        )
    return FrozenBase(base, precision, quantization)


def resolve_quantization(settings: ModelSettings, supported: tuple[str, ...]) -> tuple[str, str]:
    """Return the base's quantization with the reason: what its files have, or the recipe's.

    Raises:
        UserError: the base is stored in a quantization that the recipe or the adapter excludes.
    """
    stored = stored_quantization(load_config(settings).to_dict())
    return auto_values.quantization(settings.quantization, supported, stored)


def add_adapter(ctx: RunContext, frozen: FrozenBase) -> Policy:
    """Add the recipe's adapter to a base: the parent run's, or a new one initialized with the seed.

    Raises:
        UserError: the adapter does not fit the base, or the parent's files are corrupt.
    """
    settings = ctx.settings
    with ctx.timed("load"):
        # Seeded again: a new adapter's initialization must not depend on what loading the base consumed.
        set_seed(settings.train.seed)
        model = attach_adapter(frozen.base, settings.adapter)
        if parent := parent_adapter_run(settings.model):
            load_adapter_weights(model, parent)
    if settings.train.gradient_checkpointing:
        # Checkpointed blocks need an input with a gradient, and frozen embeddings give one without.
        frozen.base.enable_input_require_grads()
    enable_sharded_inference(ctx, model, frozen.base)
    return Policy(model, frozen.precision, frozen.quantization)
