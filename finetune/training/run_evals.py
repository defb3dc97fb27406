"""Everything that a run evaluates besides its held-out metrics: samples, graders, retention set, suites."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data_templates.segments import Message
from finetune.training.context import RunContext
from finetune.training.generation import Completion, generate_sharded
from finetune.training.generation_eval import GenerationEvals
from finetune.training.loaded_model import LoadedModel
from finetune.training.metric_specs import When
from finetune.training.metrics import as_logged
from finetune.training.suite_evals import SuiteEvals

if TYPE_CHECKING:
    from finetune.training.stage import Method


@dataclass(frozen=True)
class RunEvals:
    """The evals of a run, before, between and after its steps.

    Attributes:
        ctx: context of the run.
        method: its method.
        generation: samples, graders and retention set; None for a model that does not generate.
        suites: the recipe's suites.
    """

    ctx: RunContext
    method: "Method"
    generation: GenerationEvals | None
    suites: SuiteEvals

    @classmethod
    def load(cls, ctx: RunContext, method: "Method", generation: GenerationEvals | None) -> "RunEvals":
        """Load the recipe's suites.

        Raises:
            UserError: a suite cannot be loaded.
        """
        return cls(ctx, method, generation, SuiteEvals.load(ctx.settings.evaluate.suites))

    @property
    def notes(self) -> Sequence[str]:
        """Return messages for the log."""
        return self.generation.notes if self.generation is not None else ()

    @property
    def curves(self) -> dict[str, str]:
        """Return the metrics of metrics.jsonl with the titles of their curves."""
        graders = self.generation.graded.curves if self.generation is not None else {}
        return {**graders, **self.suites.curves}

    @property
    def summary(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        generation = self.generation.summary if self.generation is not None else {}
        return {**generation, **self.suites.summary}

    def record(self, when: When) -> None:
        """Evaluate and record, ``before`` or ``after`` training.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        if self.generation is not None:
            self.generation.run(self.ctx.run, self._generate, when)
        self.suites.record(self.ctx.run, self._loaded_model, when)

    def add_to(self, trainer: Trainer) -> None:
        """Evaluate graders and suites each time that the trainer evaluates (``train.evaluate_every``)."""
        has_graders = self.generation is not None and self.generation.graded.graders.functions
        if has_graders or self.suites.suites:
            trainer.add_callback(PeriodicEvals(self._metrics, trainer.log))

    def _metrics(self) -> dict[str, float]:
        graders = self.generation.graded.grade(self._generate) if self.generation is not None else {}
        suites = self.suites.evaluate(self._loaded_model()) if self.suites.suites else {}
        return graders | {name: result.headline[1].value for name, result in suites.items()}

    def _generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        return generate_sharded(self.ctx, self.method.text, self.method.policy, prompts)

    def _loaded_model(self) -> LoadedModel:
        text, policy = self.method.text, self.method.policy
        return LoadedModel(policy.model, text.encoder, text.context, policy.precision)


class PeriodicEvals(TrainerCallback):  # type: ignore[misc]
    """Logs further metrics after each evaluation of the trainer, on all ranks."""

    def __init__(
        self, evaluate: Callable[[], dict[str, float]], log: Callable[[dict[str, float]], None]
    ) -> None:
        """Bind the callback.

        Args:
            evaluate: returns the metrics; every rank calls it.
            log: the trainer's ``log``: metrics.jsonl and other callbacks receive them.
        """
        self.evaluate, self.log = evaluate, log

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate and log."""
        self.log({as_logged(name): value for name, value in self.evaluate().items()})
