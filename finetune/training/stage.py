"""The path of a run from directory to result, and the protocol of a method such as SFT, DPO or PPO."""

from collections.abc import Sequence, Sized
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from finetune.distributed.interrupts import NotFiniteError
from finetune.recipe.discovery import load_stage
from finetune.recipe.errors import CheckFailedError, HeldOutError, LibraryError, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.user_calls import CALLS
from finetune.training.held_out_file import compact_locations
from finetune.training.metric_specs import MetricSpec, When
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.result import Callbacks, Result
from finetune.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer, TrainingArguments

    from finetune.data.conversation import Conversation
    from finetune.data.report import DataReport
    from finetune.training.context import RunContext
    from finetune.training.findings import Finding
    from finetune.training.generation_eval import GenerationEvals
    from finetune.training.model import Policy, TextEncoding


class HeldOutRows(Sized, Protocol):
    """Held-out rows of any kind."""

    @property
    def locations(self) -> Sequence[str]:
        """Return the location (``file:line``) of each row."""
        ...


class RunData(Protocol):
    """The data of a run, of any kind."""

    @property
    def train(self) -> Sized:
        """Return the training rows."""
        ...

    @property
    def held_out(self) -> "HeldOutRows | None":
        """Return the held-out rows; None without."""
        ...

    @property
    def prompts(self) -> "Sequence[Conversation]":
        """Return conversations whose last replies are generated before and after training."""
        ...

    @property
    def probe_rows(self) -> list[list[int]]:
        """Return token ids of a few training rows, on which the saved model is compared."""
        ...

    @property
    def report(self) -> "DataReport":
        """Return the data report."""
        ...


class Method(Protocol):
    """What differs between SFT, DPO, PPO and the others; ``train`` calls the methods in this order.

    Some methods also count their own steps (``CountsSteps``), use the graders (``LoadsEvals``), evaluate more
    than the trainer does (``Evaluates``), or diagnose the finished run (``Diagnoses``).
    """

    @property
    def text(self) -> "TextEncoding":
        """Return template, tokenizer and maximum length."""
        ...

    @property
    def data(self) -> RunData:
        """Return the tokenized data."""
        ...

    @property
    def policy(self) -> "Policy":
        """Return the trained model, the one that is saved."""
        ...

    @property
    def metric_spec(self) -> MetricSpec:
        """Return the metrics of metrics.jsonl, of the summary and of the report."""
        ...

    def prepare(self) -> dict[str, Any]:
        """Check data and model before anything is written; return the method's own sections of run.json.

        A section that every method has (``reload``) is extended by the keys given here.

        Raises:
            UserError: a check failed.
        """
        ...

    def training_arguments(self, num_steps: int) -> "TrainingArguments":
        """Return the engine's training arguments, with every ``auto`` resolved.

        Args:
            num_steps: optimizer steps of the run.

        Raises:
            UserError: the engine refuses them.
        """
        ...

    def build_trainer(self, args: "TrainingArguments", num_steps: int) -> "Trainer":
        """Return the engine's trainer; its ``held_out_metrics()`` are logged between steps.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        ...


@runtime_checkable
class CountsSteps(Protocol):
    """A method whose optimizer steps are not those of epochs over the training rows."""

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run."""
        ...


@runtime_checkable
class LoadsEvals(Protocol):
    """A method that uses the recipe's graders itself; their files are executed once."""

    @property
    def evals(self) -> "GenerationEvals":
        """Return the loaded evals."""
        ...


@runtime_checkable
class Evaluates(Protocol):
    """A method that records more than its trainer's held-out metrics."""

    def evaluate(self, trainer: "Trainer", when: When) -> dict[str, float]:
        """Return the held-out metrics, before or after training; empty without held-out rows."""
        ...


@runtime_checkable
class Diagnoses(Protocol):
    """A method that judges the finished run."""

    def diagnose(self) -> "list[Finding]":
        """Return the findings on the finished run, from its metrics and samples."""
        ...


def run_stage(
    recipe: Recipe,
    console: "Console",
    *,
    force: bool = False,
    accept_changed_code: bool = False,
    command: str = "",
    callbacks: Callbacks = (),
    finish: bool = False,
) -> Result:
    """Run a recipe's stage in this process; a finished run is returned at once.

    Args:
        recipe: the recipe; its parent run and its reward models are finished runs.
        console: receives progress output.
        force: replace an existing run of this recipe.
        accept_changed_code: resume an interrupted run although files of its user functions have changed.
        command: the command line, for run.json.
        callbacks: the user's callbacks of the trainer.
        finish: end the run at its last checkpoint, without a further step.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        LibraryError: a library raised an exception; run.json has its traceback.
        Interrupted: a signal came, or nobody reads the output; a checkpoint was saved.
        StorageError: the disk is full or read-only; the last checkpoint is left.
        NotFiniteError: loss, gradient or a reward became NaN or infinite.
    """
    run = RunDirectory.of(recipe, force=force, accept_changed_code=accept_changed_code)
    if not run.finished:
        # Heavy libraries are imported from here on: a finished run is returned without them.
        from finetune.training.context import RunContext
        from finetune.training.fit import checked_callbacks

        stage, ctx = load_stage(recipe.stage), RunContext(recipe, run, console, command)
        ctx.callbacks, ctx.finish = checked_callbacks(callbacks), finish
        CALLS.limit = recipe.settings.train.function_timeout
        try:
            # Rejection sampling has a loop of its own.
            if hasattr(stage, "run"):
                stage.run(ctx)
            else:
                train(ctx, stage.build(ctx))
        except HeldOutError as error:
            from finetune.training.fit import schedule_problems

            problems = schedule_problems(recipe.settings, error.num_rows)
            raise UserError([*error.problems, *problems]) from error
        except LibraryError as error:
            run.record_library_error(error, command=command)
            raise
    return Result.of(run)


def train(ctx: "RunContext", method: Method) -> None:
    """Run a method: check, evaluate, train, save, evaluate again, diagnose.

    Args:
        ctx: context of a run that has not started.
        method: the method, with data and model loaded.

    Raises:
        UserError: a check failed.
        CheckFailedError: the run learned nothing; its files are kept.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    from finetune.distributed import collectives
    from finetune.distributed.strategies import SHARDED_WEIGHTS
    from finetune.training.fit import check_disk, fit, fit_limits, record_training_metrics
    from finetune.training.inference_files import untrained_chat_template
    from finetune.training.library_errors import adapter_errors
    from finetune.training.model import unwrap_model
    from finetune.training.reopen import check_saveable
    from finetune.training.run_evals import RunEvals
    from finetune.training.save import save_policy
    from finetune.training.schedule import check_schedule, schedule_record

    fit_limits(ctx, len(method.data.train), lambda: count_steps(ctx, method))
    if ctx.run.longer is not None:
        ctx.run.longer.check(schedule_record(ctx.settings.train, count_steps(ctx, method)))
    spec = method.metric_spec
    # Everything that can be refused is refused before the folder exists.
    evals = RunEvals.load(ctx, method, _generation_evals(ctx, method))
    with adapter_errors(unwrap_model(method.policy.model), ctx.settings.adapter, first_pass=True):
        sections = method.prepare()
    num_steps = count_steps(ctx, method)
    if ctx.strategy not in SHARDED_WEIGHTS:
        check_saveable(method.policy.model)
    args = method.training_arguments(num_steps)
    check_disk(ctx, method.policy.model, args, num_steps)
    ctx.check(*check_schedule(ctx.settings.train, num_steps, ctx.schedule_part))
    for note in [*untrained_chat_template(ctx, method.text.encoder), *evals.notes]:
        ctx.log(note)
    sections = _metadata(ctx, method, sections) | {"steps": num_steps}
    if not isinstance(method, CountsSteps):  # prompts and stop rules of RL depend on the number of steps
        sections["schedule"] = schedule_record(ctx.settings.train, num_steps)
    spec = spec.with_curves(evals.curves)
    with ctx.recorded(sections, spec.with_summary(evals.summary)):
        evals.record("before")
        trainer = method.build_trainer(args, num_steps)
        evals.add_to(trainer)
        record_held_out(ctx, method, trainer, "before")
        check_learned = fit(ctx, trainer, method.policy.model, method.text.encoder, spec)
        save_policy(ctx, method.text, method.policy, method.data.probe_rows)
        record_held_out(ctx, method, trainer, "after")
        record_training_metrics(ctx, trainer, spec.first_last)
        evals.record("after")
        collectives.barrier()  # rank 0 writes the metrics, which every rank reads
        report_findings(ctx, spec, method.diagnose() if isinstance(method, Diagnoses) else [])
        # Last: a run that did not learn keeps its files, samples and findings.
        ctx.check(check_learned(), error=CheckFailedError)


def _generation_evals(ctx: "RunContext", method: Method) -> "GenerationEvals | None":
    """Return the evals by generation; None for a model that does not generate."""
    from finetune.training.generation_eval import GenerationEvals

    if isinstance(method, LoadsEvals):
        return method.evals
    if not method.metric_spec.generates:
        return None
    return GenerationEvals.load(ctx.settings, method.text.encoder, method.data.prompts)


def _metadata(ctx: "RunContext", method: Method, sections: dict[str, Any]) -> dict[str, Any]:
    """Return run.json's sections on data and policy, with those of the method."""
    metadata = policy_metadata(ctx, method.text, method.policy, method.data.report)
    if (held_out := method.data.held_out) is not None:
        metadata["data"]["held_out_rows"] = compact_locations(held_out.locations)
    for name, section in sections.items():
        metadata[name] = {**metadata[name], **section} if name in metadata else section
    return metadata


def report_findings(ctx: "RunContext", spec: MetricSpec, findings: "Sequence[Finding]" = ()) -> None:
    """Print and record the findings on a finished run: those of every stage, and the stage's own."""
    from finetune.training.curve_findings import curve_findings
    from finetune.training.held_out_file import reward_change

    settings, change = ctx.settings, reward_change(ctx.run)
    shared = curve_findings(
        ctx.run.metrics(),
        ctx.run.record.get("metrics", {}),
        spec,
        sample_tokens=settings.max_reply_tokens,
        documents=settings.data.text_format is not None,
        reward_noise=None if change is None else change.half_width,
    )
    for finding in (*shared, *findings):
        ctx.log(finding.format_line())
    ctx.run.update(diagnostics=[finding.record() for finding in (*shared, *findings)])


def count_steps(ctx: "RunContext", method: Method) -> int:
    """Return the optimizer steps of a run: the method's own count, or those of its training rows."""
    from finetune.training.arguments import num_optimizer_steps

    if isinstance(method, CountsSteps):
        return method.num_steps
    return num_optimizer_steps(ctx.settings.train, len(method.data.train))


def check_policy(ctx: "RunContext", policy: "Policy") -> None:
    """Report size, precision, device and versions; check that the base is causal and the adapter reaches it.

    Raises:
        UserError: the base attends to later tokens.
    """
    from finetune.training.model import count_parameters
    from finetune.training.preflight.architecture_checks import check_causality, check_coverage
    from finetune.training.preflight.checks import CheckResult

    ctx.log(count_parameters(policy.model).describe())
    ctx.check(CheckResult("environment", ctx.describe_environment(policy.precision)))
    ctx.check(check_causality(policy), *check_coverage(policy.model, ctx.settings.adapter))


def held_out_metrics(method: Method, trainer: "Trainer", when: When) -> dict[str, float]:
    """Return a method's held-out metrics: its own, or those that its trainer logs between steps."""
    if isinstance(method, Evaluates):
        return method.evaluate(trainer, when)
    metrics: dict[str, float] = {} if method.data.held_out is None else trainer.held_out_metrics()
    return metrics


def record_held_out(ctx: "RunContext", method: Method, trainer: "Trainer", when: When) -> None:
    """Record a method's held-out metrics, unless a resumed run has recorded them.

    Raises:
        NotFiniteError: a metric is NaN or infinite.
    """
    if f"{EVAL_PREFIX}{method.metric_spec.main}_{when}" in ctx.run.record.get("metrics", {}):
        return
    with ctx.timed("held_out"):
        metrics = held_out_metrics(method, trainer, when)
    for name, value in metrics.items():
        if not isfinite(value):
            raise NotFiniteError(f"held-out {name} is {value} {when} training")
    count = num_held_out_cases(ctx, method)
    ctx.run.update(
        metrics={f"{EVAL_PREFIX}{name}_{when}": value for name, value in metrics.items()},
        cases={f"{EVAL_PREFIX}{name}": count for name in metrics},
    )


def num_held_out_cases(ctx: "RunContext", method: Method) -> int:
    """Return the number of held-out cases: all held-out rows, or the prompts that RL samples from."""
    count = 0 if method.data.held_out is None else len(method.data.held_out)
    is_sampled = method.metric_spec.main != "loss"
    return min(count, ctx.settings.evaluate.grader_rows) if is_sampled else count


def policy_metadata(
    ctx: "RunContext", text: "TextEncoding", policy: "Policy", report: "DataReport"
) -> dict[str, Any]:
    """Return run.json's sections on data and policy, and the settings that ``load_finished_run`` reads."""
    from finetune.training.model import count_parameters

    data = ctx.settings.data
    return {
        "data": {**asdict(report), "lines": report.lines()},
        "parameters": asdict(count_parameters(policy.model)),
        "auto": ctx.resolved,
        "reload": {
            # The saved weights contain the parent run's: loading needs only the base.
            "model": ctx.settings.model.model_dump(exclude={"init_from"}),
            "precision": policy.precision,
            "quantization": policy.quantization,
            "template": data.template,
            "template_options": data.template_options,
            "system_prompt": data.system_prompt,
            "control_suffix": text.encoder.control_suffix,
            "virtual_tokens": text.virtual_tokens,
        },
    }
