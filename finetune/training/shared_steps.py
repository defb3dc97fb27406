"""Steps that all methods share: training arguments, metadata, generation, saving, training metrics."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

from transformers import Trainer, TrainingArguments

from data_templates.segments import Message
from finetune.data.conversation import Conversation, render_reply
from finetune.data.report import DataReport
from finetune.distributed import collectives
from finetune.distributed.hardware import free_gpu_bytes
from finetune.training import auto_values
from finetune.training.arguments import SFT_CONFIG, ExecutionConfig, TrlConfigSpec, training_arguments
from finetune.training.base_trainer import BaseTrainer
from finetune.training.context import RunContext
from finetune.training.generation import Completion, generate_completions
from finetune.training.generation_eval import GenerationEval, load_generation_eval
from finetune.training.loading import Policy
from finetune.training.model import count_parameters
from finetune.training.preflight.checks import CheckResult
from finetune.training.samples import Samples, evenly_spaced
from finetune.training.save import save_trained
from finetune.training.text_encoding import TextEncoding

LAST_LOG_ENTRIES = 10
"""Log entries that are averaged for a metric's value at the end of training."""


def num_optimizer_steps(ctx: RunContext, rows: int) -> int:
    """Return the optimizer steps of a run over N rows."""
    train = ctx.recipe.settings.train
    return auto_values.optimizer_steps(
        rows, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )


def engine_arguments(
    ctx: RunContext, policy: Policy, *, longest: int, steps: int, stage: TrlConfigSpec = SFT_CONFIG
) -> TrainingArguments:
    """Return the engine's training arguments, with ``auto`` values resolved.

    Args:
        ctx: context of the run.
        policy: the model that is trained.
        longest: tokens of the longest row of a forward pass.
        steps: optimizer steps of the run.
        stage: the stage's TRL config.

    Raises:
        UserError: the engine refuses them.
    """
    train = ctx.recipe.settings.train
    micro_batch_size = auto_values.micro_batch_size(
        train.micro_batch_size,
        batch_size=ceil(train.batch_size / ctx.dist.world_size),
        longest=longest,
        hardware=ctx.hardware,
        must_divide=train.engine == "trl",
        min_rows=stage.min_rows,
        fits=_memory_predicate(ctx, policy, longest) if ctx.hardware.device == "cuda" else None,
    )
    checkpoint_every = auto_values.checkpoint_every(train.checkpoint_every, steps=steps)
    return training_arguments(
        train,
        folder=ctx.run.checkpoints,
        execution=ExecutionConfig(ctx.hardware.device, policy.precision, ctx.dist.world_size, ctx.strategy),
        micro_batch_size=ctx.resolve_auto("train.micro_batch_size", micro_batch_size),
        checkpoint_every=ctx.resolve_auto("train.checkpoint_every", checkpoint_every),
        stage=stage,
    )


def _memory_predicate(ctx: RunContext, policy: Policy, longest: int) -> Callable[[int], bool] | None:
    """Return a predicate: do N rows fit the GPU's memory?"""
    return auto_values.batch_fits(
        ctx.recipe.settings,
        precision=policy.precision,
        quantization=policy.quantization,
        longest=longest,
        num_processes=ctx.dist.world_size,
        strategy=ctx.strategy,
        # The minimum: all ranks must choose the same micro-batch size.
        gpu_bytes=min(collectives.all_gather_object(free_gpu_bytes())),
    )


def policy_metadata(
    ctx: RunContext, text: TextEncoding, policy: Policy, report: DataReport
) -> dict[str, Any]:
    """Return run.json's sections on data and policy, and the settings that ``load_finished_run`` reads."""
    data = ctx.recipe.settings.data
    return {
        "data": {**asdict(report), "lines": report.lines()},
        "parameters": asdict(count_parameters(policy.model)),
        "auto": ctx.resolved,
        "reload": {
            # The saved weights contain the parent run's: loading needs only the base.
            "model": ctx.recipe.settings.model.model_dump(exclude={"init_from"}),
            "precision": policy.precision,
            "quantization": policy.quantization,
            "template": data.template,
            "system_prompt": data.system_prompt,
            "control_suffix": text.encoder.control_suffix,
            "virtual_tokens": text.virtual_tokens,
        },
    }


def log_parameter_counts(ctx: RunContext, policy: Policy) -> None:
    parameters = count_parameters(policy.model)
    share = parameters.trained / parameters.total
    ctx.log(f"{parameters.trained:,} of {parameters.total:,} parameters are trained ({share:.2%})")


def build_samples(ctx: RunContext, text: TextEncoding, conversations: Sequence[Conversation]) -> Samples:
    """Return the prompts of samples.jsonl, evenly spaced over the held-out conversations."""
    evaluate = ctx.recipe.settings.evaluate
    prompts = [row.messages for row in conversations]
    shown = evenly_spaced(len(prompts), evaluate.samples)
    others = [index for index in range(len(prompts)) if index not in shown]
    # The shown prompts come first; exact match may score more of them.
    count = max(evaluate.samples, evaluate.exact_match)
    conversations_to_show = [
        render_reply(prompts[index], text.encoder) for index in [*shown, *others][:count]
    ]
    return Samples(conversations_to_show, evaluate.samples, scored=evaluate.exact_match > 0)


def build_generation_eval(
    ctx: RunContext, text: TextEncoding, conversations: Sequence[Conversation]
) -> GenerationEval:
    """Return the evaluation of completions for these conversations, before and after training.

    Raises:
        UserError: a grader or the retention set cannot be loaded.
    """
    settings = ctx.recipe.settings
    prompts = [row.messages for row in conversations]
    return load_generation_eval(settings.evaluate, prompts, text.encoder, seed=settings.train.seed)


def generate_sharded(
    ctx: RunContext, text: TextEncoding, policy: Policy, prompts: Sequence[Sequence[Message]]
) -> list[Completion]:
    """Generate completions greedily with the current policy, sharded over ranks and gathered on all."""
    with ctx.timed("samples"):
        shard = generate_completions(
            policy.model,
            text.encoder,
            collectives.shard(prompts),
            max_new_tokens=ctx.recipe.settings.evaluate.max_new_tokens,
            context=text.context,
        )
        return collectives.unshard(collectives.all_gather_object(shard))


def save_policy(ctx: RunContext, text: TextEncoding, policy: Policy) -> None:
    """Save the adapter (or the model), reload it to verify it, and record its checksums.

    Raises:
        UserError: the saved weights differ from the trained ones.
    """
    files = collectives.broadcast_object(save_trained(ctx.run, policy.model, text.encoder.tokenizer))
    ctx.run.update(files=files)
    ctx.check(CheckResult("saved", f"{', '.join(files)}: reloaded, equal to the trained weights"))


def record_training_metrics(ctx: RunContext, trainer: Trainer, keys: Sequence[str] = ("loss",)) -> None:
    """Record metrics at the start and end of training, and tokens per second with the native trainer."""
    entries = ctx.run.metrics()
    for key in keys:
        values = [entry[key] for entry in entries if key in entry]
        if values:  # empty if train.log_every exceeds the number of steps
            # Averaged, because a single log entry is noisy.
            last = values[-LAST_LOG_ENTRIES:]
            ctx.run.update(metrics={f"{key}_before": values[0], f"{key}_after": sum(last) / len(last)})
    # TRL's trainers do not count tokens; a run that resumes after its last step has none.
    if isinstance(trainer, BaseTrainer) and (
        num_tokens := sum(collectives.all_gather_object(trainer.num_tokens))
    ):
        ctx.run.update(metrics={"tokens_per_second": round(num_tokens / ctx.seconds["train"])})
