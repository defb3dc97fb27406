"""Train to the last step: resume, callbacks, checks after the first steps and after the last one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune.data.tokens import Encoder
from finetune.distributed import collectives
from finetune.distributed.full_checkpoint import FullStateCheckpoint, check_resharding
from finetune.distributed.strategies import REPLICATED, SHARDED_WEIGHTS, ZERO_STAGES
from finetune.recipe.disk import writing_inside
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import fit_to_rows
from finetune.recipe.runs import resume_command
from finetune.recipe.settings import StageSettings
from finetune.training import checkpoints
from finetune.training.arguments import num_optimizer_steps
from finetune.training.context import RunContext
from finetune.training.curve_findings import end_means, end_window
from finetune.training.disk_plan import DiskPlan, check_run_space
from finetune.training.inference_files import InferenceFiles
from finetune.training.metric_specs import MetricSpec
from finetune.training.model import unwrap_model
from finetune.training.preflight.checks import CheckResult
from finetune.training.preflight.first_steps import FirstStepsCheck
from finetune.training.preflight.learning_checks import (
    TrainedChecksums,
    check_learning,
    trained_checksums,
    unmoved_layers,
)
from finetune.training.preflight.weight_checks import (
    ShardingCheck,
    check_base_unchanged,
    check_replicas_equal,
    frozen_checksums,
    trained_digest,
)
from finetune.training.recorder import AlreadyTrained, Recorder
from finetune.training.schedule import ScheduledTrainer, check_warmup
from finetune.training.trainer import BaseTrainer, first_row_ids, initial_param_groups


def fit(
    ctx: RunContext, trainer: Trainer, policy: nn.Module, encoder: Encoder, spec: MetricSpec
) -> Callable[[], CheckResult]:
    """Train to the last step, resuming from the newest valid checkpoint.

    Args:
        ctx: context of the run.
        trainer: the engine's trainer.
        policy: the model that is saved, which the trainer trains.
        encoder: tokenizer and template, which each checkpoint gets.
        spec: the metrics of metrics.jsonl, and whether a step may have zero gradients.

    Returns:
        The check that the run has learned, for when the held-out metrics are recorded.

    Raises:
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient is NaN or infinite.
        UserError: the adapter gets no gradient, or the frozen base changed.
    """
    # Rank 0 decides for all: it deletes corrupt checkpoints while the others would still look at them.
    last = collectives.broadcast_object(
        _select_checkpoint(ctx) if ctx.dist.is_main else checkpoints.NO_CHECKPOINT
    )
    if last.path:
        check_resharding(last.path, strategy=ctx.strategy, num_processes=ctx.dist.world_size)
    num_steps = _begin_at(ctx, last)
    assert isinstance(trainer, ScheduledTrainer), "every engine's trainer has the one schedule"
    trainer.schedule_part = ctx.schedule_part
    recorder = Recorder(
        ctx.run, ctx.console, ctx.signal_flag, logged_keys=spec.logged_keys, finish=ctx.finish
    )
    if ctx.run.is_writer:
        # Before the recorder, which writes the checksums of a complete checkpoint.
        trainer.add_callback(InferenceFiles(unwrap_model(policy), encoder))
    _add_callbacks(ctx, trainer, recorder, allows_zero_gradients=spec.allows_zero_gradients)
    before = frozen_checksums(trainer.model)
    # Of the initial weights, also when training resumes: the Trainer loads the checkpoint later.
    trained_before = trained_checksums(trainer.model, policy)
    # ZeRO-3's inference engine is destroyed before DeepSpeed wraps the model for training.
    ctx.loading_contexts.close()

    def newest_checkpoint() -> Path:
        return ctx.run.checkpoints / f"checkpoint-{trainer.state.global_step}"

    size = DiskPlan.of(trainer.model, trainer.args, num_steps=1).checkpoint
    with ctx.timed("train"), writing_inside(ctx.run.path, file=newest_checkpoint, needed=size):
        has_trained = _train(ctx, trainer, last.path)
    recorder.progress.stop()
    if not has_trained:
        _end_at(ctx, last, num_steps)
    # After a signal the trainer returns as if it had finished: the checks below are for a trained model.
    ctx.raise_if_interrupted(f"at step {trainer.state.global_step}; checkpoint saved")
    ctx.check(check_base_unchanged(before, frozen_checksums(trainer.model)))
    if ctx.strategy in REPLICATED:
        ctx.check(check_replicas_equal(collectives.all_gather_object(trained_digest(trainer.model))))
    unmoved = unmoved_layers(trained_before, trained_checksums(trainer.model, policy))
    return partial(_check_learned, ctx, trained_before, unmoved)


def _train(ctx: RunContext, trainer: Trainer, checkpoint: Path | None) -> bool:
    """Train to the last step; return False if the checkpoint is of it already, or the run ends there."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AlreadyTrained:
        if not ctx.finish:
            ctx.log("training already complete")
        return False
    return True


def _begin_at(ctx: RunContext, last: checkpoints.LastCheckpoint) -> int:
    """Make the run's files those of a checkpoint, and return the optimizer steps of the run."""
    num_steps = int(ctx.run.record["steps"])
    _check_finishable(ctx, last)
    ctx.run.truncate_after(last.step)
    if last.path:
        ctx.log(f"{'finishing at' if ctx.finish else 'resuming from'} step {last.step} of {num_steps}")
    if last.step < num_steps and not ctx.finish:
        ctx.run.forget_results()
    return num_steps


def _end_at(ctx: RunContext, last: checkpoints.LastCheckpoint, num_steps: int) -> None:
    """Record that a run ends at a checkpoint."""
    del ctx.seconds["train"]  # those of loading the checkpoint
    if last.step < num_steps:
        early = {"at": last.step, "of": num_steps, "unit": "step"}
        ctx.run.update(steps=last.step, finished_early=early)


def _check_finishable(ctx: RunContext, last: checkpoints.LastCheckpoint) -> None:
    """Raise UserError if a run shall end at its last checkpoint and none is valid."""
    if ctx.finish and last.path is None:
        actual = f"no valid checkpoint: {'; '.join(last.corrupt) or 'the run has saved none'}"
        repair = f"`{resume_command(ctx.run.record)}` trains it"
        raise UserError(Problem(str(ctx.run.path), actual, "a run with a checkpoint", repair))


def _check_learned(
    ctx: RunContext, before: TrainedChecksums, unmoved: Mapping[str, Sequence[str]]
) -> CheckResult:
    # Rank 0 has the metrics file, and all ranks must agree.
    entries = collectives.broadcast_object(ctx.run.metrics() if ctx.dist.is_main else [])
    return check_learning(before, unmoved, metrics=ctx.run.record.get("metrics", {}), entries=entries)


def fit_limits(ctx: RunContext, num_rows: int, count_steps: Callable[[], int]) -> None:
    """Fit the numbers that the user did not set to the training rows; each change is a line.

    Args:
        ctx: context of a run whose rows are read.
        num_rows: training rows.
        count_steps: returns the optimizer steps with the context's settings.
    """

    def steps_with(settings: StageSettings) -> int:
        ctx.fitted = settings
        return count_steps()

    ctx.fitted, changes = fit_to_rows(
        ctx.recipe.settings, num_rows, steps_with, num_parts=ctx.schedule_part.num_parts
    )
    for change in changes:
        ctx.check(CheckResult("fitted", change.line()))
        ctx.resolve_auto(change.key, (f"{change.after:g}", change.reason))


def schedule_problems(settings: StageSettings, num_rows: int) -> list[Problem]:
    """Return what else the user has to repair on few rows: all problems are reported at once."""
    fitted, _ = fit_to_rows(settings, num_rows, lambda fitted: num_optimizer_steps(fitted.train, num_rows))
    results = check_warmup(fitted.train, num_optimizer_steps(fitted.train, num_rows))
    return [result.problem for result in results if result.problem is not None]


def check_disk(ctx: RunContext, model: nn.Module, args: TrainingArguments, num_steps: int) -> None:
    """Raise StorageError if the disk has no room for the checkpoints and the result of training a model."""
    plan = DiskPlan.of(model, args, num_steps=num_steps)
    check_run_space(ctx.run, plan, num_steps=num_steps, save_every=int(args.save_steps))


def record_training_metrics(ctx: RunContext, trainer: Trainer, keys: Sequence[str]) -> None:
    """Record metrics at the start and end of training, and tokens per second with the native trainer."""
    entries = ctx.run.metrics()
    for key in keys:
        values = [entry[key] for entry in entries if key in entry]
        if values:  # empty if train.log_every exceeds the number of steps
            first, last = end_means(values)
            ctx.run.update(metrics={f"{key}_before": first, f"{key}_after": last})
            if key == "loss":
                ctx.run.update(window=end_window(len(values)))
    # TRL's trainers do not count tokens; a run that resumes after its last step has none.
    if isinstance(trainer, BaseTrainer) and (
        num_tokens := sum(collectives.all_gather_object(trainer.num_tokens))
    ):
        ctx.run.update(metrics={"tokens_per_second": round(num_tokens / ctx.seconds["train"])})


def _select_checkpoint(ctx: RunContext) -> checkpoints.LastCheckpoint:
    """Return the newest valid checkpoint, and delete the corrupt ones after it if training goes on."""
    last = checkpoints.find_last_valid(ctx.run.checkpoints)
    for problem in last.corrupt:
        ctx.log(f"corrupt checkpoint, using the previous one: {problem}")
    if not ctx.finish:
        checkpoints.remove_newer_than(ctx.run.checkpoints, last.step)
    return last


def checked_callbacks(callbacks: Sequence[TrainerCallback | type[TrainerCallback]]) -> list[TrainerCallback]:
    """Return the user's callbacks as objects.

    Raises:
        UserError: one of them is no ``TrainerCallback``.
    """
    made = [value() if isinstance(value, type) else value for value in callbacks]
    wrong = [index for index, value in enumerate(made) if not isinstance(value, TrainerCallback)]
    if wrong:
        actual = f"found {type(made[wrong[0]]).__name__}"
        expected = "an object or a subclass of transformers.TrainerCallback"
        repair = (
            "class Mine(TrainerCallback): def on_log(self, args, state, control, logs=None, **kwargs): ..."
        )
        raise UserError(Problem(f"callbacks[{wrong[0]}]", actual, expected, repair))
    return made


def _add_callbacks(
    ctx: RunContext, trainer: Trainer, recorder: Recorder, *, allows_zero_gradients: bool
) -> None:
    trainer.remove_callback(PrinterCallback)  # the recorder prints instead
    if ctx.strategy in (*ZERO_STAGES, *SHARDED_WEIGHTS):
        # Before the recorder, which writes the checksums of a complete checkpoint.
        trainer.add_callback(
            FullStateCheckpoint(partial(initial_param_groups, trainer), strategy=ctx.strategy)
        )
        trainer.add_callback(
            ShardingCheck(ctx.check, strategy=ctx.strategy, rows=partial(first_row_ids, trainer))
        )
    trainer.add_callback(recorder)
    uses_zero = ctx.strategy in ZERO_STAGES
    trainer.add_callback(
        FirstStepsCheck(
            ctx.check, allows_zero_gradients=allows_zero_gradients, engine_takes_gradients=uses_zero
        )
    )
    # The user's come last: what they see is recorded already.
    for callback in ctx.callbacks:
        trainer.add_callback(callback)
