"""The path of a run from directory to result, and the protocol of a method such as SFT, DPO or PPO."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from finetune.recipe.discovery import load_stage
from finetune.recipe.recipe import Recipe
from finetune.training.metric_specs import MetricSpec
from finetune.training.result import Result
from finetune.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer, TrainingArguments

    from data_templates.segments import Message
    from finetune.data.conversation import Conversation
    from finetune.data.report import DataReport
    from finetune.training.context import RunContext
    from finetune.training.findings import Finding
    from finetune.training.generation import Completion
    from finetune.training.loading import Policy
    from finetune.training.text_encoding import TextEncoding


class RunData(Protocol):
    """The data of a run, of any kind."""

    @property
    def prompts(self) -> "Sequence[Conversation]":
        """Return conversations whose last replies are generated before and after training."""
        ...

    @property
    def report(self) -> "DataReport":
        """Return the data report."""
        ...


class Method(Protocol):
    """What differs between SFT, DPO, PPO and the others; ``train`` calls the methods in this order.

    Attributes:
        generates: whether the trained model writes text, for samples.jsonl and graders.
        allows_zero_gradients: whether a step may have zero gradients.
    """

    generates: ClassVar[bool]
    allows_zero_gradients: ClassVar[bool]

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

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run."""
        ...

    def prepare(self) -> dict[str, Any]:
        """Check data and model before anything is written; return the method's own sections of run.json.

        Raises:
            UserError: a check failed.
        """
        ...

    def arguments(self) -> "TrainingArguments":
        """Return the engine's training arguments, with every ``auto`` resolved.

        Raises:
            UserError: the engine refuses them.
        """
        ...

    def build_trainer(self, args: "TrainingArguments") -> "Trainer":
        """Return the engine's trainer.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        ...

    def evaluate(self, trainer: "Trainer", when: str) -> dict[str, float]:
        """Return the held-out metrics; empty without held-out rows. ``when``: ``before`` or ``after``."""
        ...

    def diagnose(self) -> "list[Finding]":
        """Return the findings on the finished run, from its metrics and samples."""
        ...


def run_stage(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> Result:
    """Run a recipe's stage in this process; a finished run is returned at once.

    Args:
        recipe: the recipe; its parent run and its reward models are finished runs.
        console: receives progress output.
        force: replace an existing run of this recipe.
        command: the command line, for run.json.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        Interrupted: a signal came; a checkpoint was saved, and the same command resumes.
        NotFiniteError: loss, gradient or a reward became NaN or infinite.
    """
    run = RunDirectory.of(recipe, force=force)
    if not run.finished:
        # Heavy libraries are imported from here on: a finished run is returned without them.
        from finetune.training.context import RunContext

        stage, ctx = load_stage(recipe.stage), RunContext(recipe, run, console, command)
        # Rejection sampling has a loop of its own.
        if hasattr(stage, "run"):
            stage.run(ctx)
        else:
            train(ctx, stage.build(ctx))
    return Result.of(run)


def train(ctx: "RunContext[Any]", method: Method) -> None:
    """Check, evaluate, train, save, evaluate again, diagnose.

    Args:
        ctx: context of a run that has not started.
        method: the method, with data and model loaded.

    Raises:
        UserError: a check failed.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    from finetune.distributed import collectives
    from finetune.training.fit import fit, record_training_metrics
    from finetune.training.generation_eval import GenerationEvals
    from finetune.training.save import save_policy

    def generate(prompts: "Sequence[Sequence[Message]]") -> "list[Completion]":
        return generate_sharded(ctx, method.text, method.policy, prompts)

    spec = method.metric_spec
    # Everything that can be refused is refused before the folder exists.
    evals = GenerationEvals.load(ctx, method.text, method.data.prompts) if method.generates else None
    sections, args = method.prepare(), method.arguments()
    metadata = merge_sections(policy_metadata(ctx, method.text, method.policy, method.data.report), sections)
    with ctx.recorded(metadata, spec.with_summary(evals.summary if evals else {})):
        if evals:
            evals.run(ctx.run, generate, "before")
        trainer = method.build_trainer(args)
        record_held_out(ctx, spec, lambda when: method.evaluate(trainer, when), "before")
        fit(
            ctx,
            trainer,
            logged_keys=spec.logged_keys,
            allows_zero_gradients=method.allows_zero_gradients,
        )
        save_policy(ctx, method.text, method.policy)
        record_held_out(ctx, spec, lambda when: method.evaluate(trainer, when), "after")
        record_training_metrics(ctx, trainer, spec.first_last)
        if evals:
            evals.run(ctx.run, generate, "after")
        collectives.barrier()  # rank 0 writes the metrics, which every rank reads
        record_findings(ctx, method.diagnose())
