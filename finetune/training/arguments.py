"""Map recipe settings to the training arguments of the engines: TrainingArguments, or a config of TRL."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from finetune.data.batches import num_micro_batches
from finetune.distributed import collectives
from finetune.distributed.hardware import free_gpu_bytes
from finetune.distributed.strategies import strategy_arguments
from finetune.library_internals import replace_deepspeed_plugin
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.rules import check_batch_divides
from finetune.recipe.settings import TrainSettings
from finetune.training import auto_values
from finetune.training.context import RunContext
from finetune.training.model import Policy

TRAINER_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "adafactor": "adafactor",
}


@dataclass(frozen=True, slots=True)
class ExecutionConfig:
    """How a run executes: device, precision of the forward pass, number of processes, strategy."""

    device: str
    precision: str
    num_processes: int = 1
    strategy: str = "single"


@dataclass(frozen=True, slots=True)
class TrlConfigSpec:
    """The TRL config of a stage.

    Attributes:
        config: the config class.
        fixed_arguments: its fields that the stage sets.
        min_rows: minimum rows per forward pass.
    """

    config: type[TrainingArguments]
    fixed_arguments: Mapping[str, Any]
    min_rows: int = 1

    def with_arguments(self, arguments: Mapping[str, Any]) -> "TrlConfigSpec":
        """Return the config with more fields that the stage sets."""
        return replace(self, fixed_arguments={**self.fixed_arguments, **arguments})


# Rows are truncated already, and packing is the recipe's.
SFT_CONFIG = TrlConfigSpec(SFTConfig, {"max_length": None, "packing": False})


def engine_class(engine: str, trl_config: TrlConfigSpec = SFT_CONFIG) -> type[TrainingArguments]:
    """Return the class of the engine's training arguments."""
    return trl_config.config if engine == "trl" else TrainingArguments


def _engine_specific_arguments(settings: TrainSettings, trl_config: TrlConfigSpec) -> dict[str, Any]:
    """Return the arguments that the recipe sets and that not every engine has."""
    if settings.engine != "trl":
        return {"neftune_noise_alpha": None, "label_smoothing_factor": 0.0}  # ours, in trainer.py
    regularization = {
        "neftune_noise_alpha": settings.neftune_alpha,
        "label_smoothing_factor": settings.label_smoothing,
    }
    return regularization | dict(trl_config.fixed_arguments)


def common_arguments(
    settings: TrainSettings,
    *,
    folder: Path,
    execution: ExecutionConfig,
    micro_batch_size: int,
    checkpoint_every: int,
) -> dict[str, Any]:
    """Return the arguments that the recipe sets and that all engines share."""
    beta1, beta2 = settings.betas
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        # -1: no limit, the epochs decide.
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches(
            settings.batch_size, micro_batch_size, execution.num_processes
        ),
        "learning_rate": settings.learning_rate,
        # Read by `ScheduledTrainer`: decay, and warm-up in steps or, below 1, as a fraction of all steps.
        "lr_scheduler_type": settings.lr_schedule,
        "warmup_steps": settings.warmup,
        "optim": TRAINER_OPTIMIZERS[settings.optimizer],
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "use_cpu": execution.device == "cpu",  # otherwise transformers refuses bf16 on a CPU
        "bf16": execution.precision == "bfloat16",
        "fp16": execution.precision == "float16",
        "ddp_timeout": int(collectives.TIMEOUT.total_seconds()),
        "activation_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": checkpoint_every,
        "save_total_limit": settings.keep_checkpoints,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,  # the recorder stops the run on NaN, so it must see it
        "eval_strategy": "steps" if settings.evaluate_every else "no",
        "eval_steps": settings.evaluate_every,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": settings.engine == "trl",  # our batches carry row ids, no model argument
        **strategy_arguments(
            execution.strategy, precision=execution.precision, offload=settings.offload, folder=folder.parent
        ),
    }


def training_arguments(
    settings: TrainSettings,
    *,
    folder: Path,
    execution: ExecutionConfig,
    micro_batch_size: int,
    checkpoint_every: int,
    trl_config: TrlConfigSpec = SFT_CONFIG,
) -> TrainingArguments:
    """Return the engine's training arguments; ``trl_config`` is the stage's.

    Raises:
        UserError: the engine refuses a value, or TRL's steps would not hold ``train.batch_size`` rows.
    """
    if settings.engine == "trl":
        check_batch_divides(settings.batch_size, micro_batch_size, execution.num_processes)
    arguments = _engine_specific_arguments(settings, trl_config) | common_arguments(
        settings,
        folder=folder,
        execution=execution,
        micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every,
    )
    try:
        engine_arguments = engine_class(settings.engine, trl_config)(**arguments, **settings.engine_args)
    except (ValueError, TypeError) as error:
        raise UserError(Problem("train.engine_args", str(error), "values that the engine accepts")) from error
    # Before a trainer reads the plugin from these arguments.
    replace_deepspeed_plugin(engine_arguments)
    return engine_arguments


def resolve_arguments(
    ctx: RunContext,
    policy: Policy,
    *,
    longest: int,
    steps: int,
    max_steps: int | None = None,
    trl_config: TrlConfigSpec = SFT_CONFIG,
) -> TrainingArguments:
    """Return the training arguments of a run, with ``auto`` values resolved and recorded.

    Args:
        ctx: context of the run.
        policy: the model that is trained.
        longest: tokens of the longest row of a forward pass.
        steps: optimizer steps of the run.
        max_steps: where the Trainer stops, for a method whose epochs it cannot count; by default
            ``train.max_steps``.
        trl_config: the stage's TRL config.

    Raises:
        UserError: the engine refuses them.
    """
    train = ctx.settings.train
    if max_steps is not None:
        train = train.model_copy(update={"max_steps": max_steps})
    micro_batch_size = auto_values.micro_batch_size(
        train.micro_batch_size,
        batch_size=ceil(train.batch_size / ctx.dist.world_size),
        longest=longest,
        hardware=ctx.hardware,
        must_divide=train.engine == "trl",
        min_rows=trl_config.min_rows,
        fits=_memory_predicate(ctx, policy, longest) if ctx.hardware.device == "cuda" else None,
    )
    checkpoint_every = auto_values.checkpoint_every(train.checkpoint_every, steps=steps)
    return training_arguments(
        train,
        folder=ctx.run.checkpoints,
        execution=ExecutionConfig(ctx.hardware.device, policy.precision, ctx.dist.world_size, ctx.strategy),
        micro_batch_size=ctx.resolve_auto("train.micro_batch_size", micro_batch_size),
        checkpoint_every=ctx.resolve_auto("train.checkpoint_every", checkpoint_every),
        trl_config=trl_config,
    )


def _memory_predicate(ctx: RunContext, policy: Policy, longest: int) -> Callable[[int], bool] | None:
    """Return a predicate: do N rows fit the GPU's memory?"""
    return auto_values.batch_fits(
        ctx.settings,
        precision=policy.precision,
        quantization=policy.quantization,
        longest=longest,
        num_processes=ctx.dist.world_size,
        strategy=ctx.strategy,
        # The minimum: all ranks must choose the same micro-batch size.
        gpu_bytes=min(collectives.all_gather_object(free_gpu_bytes())),
    )


def num_optimizer_steps(train: TrainSettings, rows: int) -> int:
    """Return the optimizer steps of a run over N rows."""
    return auto_values.optimizer_steps(
        rows, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )
