"""What every stage does that tunes a policy: arguments, facts, replies, the saved result, the record."""

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
"""Lines of metrics that stand for the end of training."""


def optimizer_steps(job: Job, rows: int) -> int:
    """Return the optimizer steps of a run over so many rows."""
    train = job.recipe.settings.train
    return choices.optimizer_steps(
        rows, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )


def engine_arguments(
    job: Job, policy: Policy, *, longest: int, steps: int, stage: TrlStage = SUPERVISED
) -> TrainingArguments:
    """Return the engine's arguments; whatever is ``auto`` is decided here.

    Args:
        job: the stage at work.
        policy: what is trained.
        longest: tokens of the longest row, as a forward pass lays it out.
        steps: optimizer steps of the run.
        stage: what the engine ``trl`` calls the stage's arguments.

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
    """Return what tells how many rows the GPU has memory for."""
    return rows_that_fit(
        job.recipe.settings,
        policy,
        longest=longest,
        processes=job.world.size,
        strategy=job.strategy,
        room=min(processes.everyones(free_bytes())),  # or the processes would cut a step differently
    )


def policy_facts(job: Job, text: Text, policy: Policy, report: DataReport) -> dict[str, Any]:
    """Return what run.json says of data and policy, and what ``load_tuned`` opens the result with."""
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
    """Tell how many parameters are trained."""
    parameters = count_parameters(policy.model)
    share = parameters.trained / parameters.total
    job.say(f"{parameters.trained:,} of {parameters.total:,} parameters are trained ({share:.2%})")


def samples_of(job: Job, text: Text, conversations: Sequence[Conversation]) -> Samples:
    """Return the questions to answer before and after training."""
    evaluate = job.recipe.settings.evaluate
    prompts = [row.messages for row in conversations]
    shown = spread(len(prompts), evaluate.samples)
    others = [index for index in range(len(prompts)) if index not in shown]
    count = max(evaluate.samples, evaluate.exact_match)
    chosen = [worded(prompts[index], text.encoder) for index in [*shown, *others][:count]]
    return Samples(chosen, evaluate.samples, scored=evaluate.exact_match > 0)


def behaviour_of(job: Job, text: Text, conversations: Sequence[Conversation]) -> Behaviour:
    """Return what is measured of the replies to these conversations, before and after training.

    Raises:
        UserError: a judge or the file of the skill cannot be used.
    """
    settings = job.recipe.settings
    prompts = [row.messages for row in conversations]
    return load_behaviour(settings.evaluate, prompts, text.encoder, seed=settings.train.seed)


def replies(job: Job, text: Text, policy: Policy, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
    """Answer prompts greedily with the policy as it is; each process answers its share."""
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
    """Save the adapter (or the model), open it again, and put its checksum into the record.

    Raises:
        UserError: what was saved is not what was trained.
    """
    files = processes.from_main(save_tuned(job.run, policy.model, text.encoder.tokenizer))
    job.run.update(files=files)
    job.check(Tick("saved", f"{', '.join(files)}: opened again, equal to what was trained"))


def record_training(job: Job, trainer: Trainer, keys: Sequence[str] = ("loss",)) -> None:
    """Record metrics at both ends of training, and the tokens per second where our trainer counts them."""
    lines = job.run.metrics()
    for key in keys:
        values = [line[key] for line in lines if key in line]
        if values:  # none with train.log_every above the number of steps
            last = values[-LAST:]
            job.run.update(metrics={f"{key}_before": values[0], f"{key}_after": sum(last) / len(last)})
    if isinstance(trainer, BaseTrainer) and (tokens := sum(processes.everyones(trainer.num_tokens))):
        job.run.update(metrics={"tokens_per_second": round(tokens / job.seconds["train"])})
