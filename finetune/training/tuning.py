"""Steps that all methods share: training arguments, metadata, generation, saving, training metrics."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

from transformers import Trainer, TrainingArguments

from data_templates._segments import Message
from finetune.data.conversation import Conversation
from finetune.data.replies import worded
from finetune.data.report import DataReport
from finetune.planning import choices
from finetune.training import processes
from finetune.training.arguments import SUPERVISED, Machine, TrlStage, training_arguments
from finetune.training.base_trainer import BaseTrainer
from finetune.training.behaviour import Behaviour, load_behaviour
from finetune.training.generate import Reply, reply_to
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.memory_room import free_bytes, rows_that_fit
from finetune.training.model import count_parameters
from finetune.training.preflight.ticks import Tick
from finetune.training.samples import Samples, spread
from finetune.training.save import save_tuned
from finetune.training.text import Text

LAST = 10
"""Log entries that are averaged for a metric's value at the end of training."""


def optimizer_steps(job: Job, rows: int) -> int:
    """Return the optimizer steps of a run over N rows."""
    train = job.recipe.settings.train
    return choices.optimizer_steps(
        rows, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )


def engine_arguments(
    job: Job, policy: Policy, *, longest: int, steps: int, stage: TrlStage = SUPERVISED
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
    train = job.recipe.settings.train
    micro = choices.micro_batch_size(
        train.micro_batch_size,
        batch_size=ceil(train.batch_size / job.world.size),
        longest=longest,
        hardware=job.hardware,
        whole=train.engine == "trl",
        least=stage.least,
        fits=_memory(job, policy, longest) if job.hardware.device == "cuda" else None,
    )
    every = choices.checkpoint_every(train.checkpoint_every, steps=steps)
    return training_arguments(
        train,
        folder=job.run.checkpoints,
        machine=Machine(job.hardware.device, policy.precision, job.world.size, job.strategy),
        micro_batch_size=job.choose("train.micro_batch_size", micro),
        checkpoint_every=job.choose("train.checkpoint_every", every),
        stage=stage,
    )


def _memory(job: Job, policy: Policy, longest: int) -> Callable[[int], bool] | None:
    """Return a predicate: do N rows fit the GPU's memory?"""
    return rows_that_fit(
        job.recipe.settings,
        policy,
        longest=longest,
        processes=job.world.size,
        strategy=job.strategy,
        room=min(processes.everyones(free_bytes())),  # ranks must agree on the micro-batch size
    )


def policy_facts(job: Job, text: Text, policy: Policy, report: DataReport) -> dict[str, Any]:
    """Return run.json's sections on data and policy, and the settings that ``load_finished_run`` reads."""
    data = job.recipe.settings.data
    return {
        "data": {**asdict(report), "lines": report.lines()},
        "parameters": asdict(count_parameters(policy.model)),
        "choices": job.derived,
        "load": {
            "model": job.recipe.settings.model.model_dump(exclude={"start"}),
            "precision": policy.precision,
            "quantization": policy.quantization,
            "template": data.template,
            "system": data.system,
            "wish": text.encoder.wish,
            "virtual_tokens": text.virtual_tokens,
        },
    }


def say_parameters(job: Job, policy: Policy) -> None:
    parameters = count_parameters(policy.model)
    share = parameters.trained / parameters.total
    job.say(f"{parameters.trained:,} of {parameters.total:,} parameters are trained ({share:.2%})")


def samples_of(job: Job, text: Text, conversations: Sequence[Conversation]) -> Samples:
    """Return the prompts of samples.jsonl, evenly spaced over the held-out conversations."""
    evaluate = job.recipe.settings.evaluate
    prompts = [row.messages for row in conversations]
    shown = spread(len(prompts), evaluate.samples)
    others = [index for index in range(len(prompts)) if index not in shown]
    # The shown prompts come first; exact match may score more of them.
    count = max(evaluate.samples, evaluate.exact_match)
    chosen = [worded(prompts[index], text.encoder) for index in [*shown, *others][:count]]
    return Samples(chosen, evaluate.samples, scored=evaluate.exact_match > 0)


def behaviour_of(job: Job, text: Text, conversations: Sequence[Conversation]) -> Behaviour:
    """Return the evaluation of completions for these conversations, before and after training.

    Raises:
        UserError: a grader or the retention set cannot be loaded.
    """
    settings = job.recipe.settings
    prompts = [row.messages for row in conversations]
    return load_behaviour(settings.evaluate, prompts, text.encoder, seed=settings.train.seed)


def replies(job: Job, text: Text, policy: Policy, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
    """Generate completions greedily with the current policy, sharded over ranks and gathered on all."""
    with job.timed("samples"):
        own = reply_to(
            policy.model,
            text.encoder,
            processes.share(prompts),
            max_new_tokens=job.recipe.settings.evaluate.max_new_tokens,
            context=text.context,
        )
        return processes.together(processes.everyones(own))


def save_policy(job: Job, text: Text, policy: Policy) -> None:
    """Save the adapter (or the model), reload it to verify it, and record its checksums.

    Raises:
        UserError: the saved weights differ from the trained ones.
    """
    files = processes.from_main(save_tuned(job.run, policy.model, text.encoder.tokenizer))
    job.run.update(files=files)
    job.check(Tick("saved", f"{', '.join(files)}: reloaded, equal to the trained weights"))


def record_training(job: Job, trainer: Trainer, keys: Sequence[str] = ("loss",)) -> None:
    """Record metrics at the start and end of training, and tokens per second with the native trainer."""
    lines = job.run.metrics()
    for key in keys:
        values = [line[key] for line in lines if key in line]
        if values:  # empty if train.log_every exceeds the number of steps
            last = values[-LAST:]
            job.run.update(metrics={f"{key}_before": values[0], f"{key}_after": sum(last) / len(last)})
    if isinstance(trainer, BaseTrainer) and (tokens := sum(processes.everyones(trainer.num_tokens))):
        job.run.update(metrics={"tokens_per_second": round(tokens / job.seconds["train"])})
