"""Generation evals before and after training: samples, Python graders, exact match on a retention set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from data_templates.segments import Message
from finetune.data.conversation import Conversation, render_reply
from finetune.data.conversation_rows import load_conversations
from finetune.data.load import SourceSpec
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import EvaluateSettings, StageSettings
from finetune.recipe.user_function import call_user_function, load_graders
from finetune.training.metric_specs import When
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.run_directory import RunDirectory
from finetune.training.samples import GenerateFn, Samples, evenly_spaced, prompt_text


class Grader(Protocol):
    """A user's function: the grade of a reply, or None to skip the prompt."""

    def __call__(self, prompt: str, reply: str, /) -> float | bool | None:
        """Return true or 1 for a good reply, false or 0 for a bad one."""
        ...


@dataclass(frozen=True)
class GenerationEval:
    """Graders of greedy completions to ``prompts``, and exact match of those to the ``retention`` set.

    Both hold conversations that end with the expected reply.
    """

    graders: Mapping[str, Grader]
    prompts: Sequence[Sequence[Message]]
    retention: Sequence[Sequence[Message]]

    def evaluate(self, run: RunDirectory, generate: GenerateFn, when: When) -> None:
        """Record each grader's mean and the retention set's exact-match rate, ``before`` or ``after``.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        # A resumed run keeps the metrics that its first start recorded for the untrained model.
        metric_names = [f"{EVAL_PREFIX}graders/{name}_{when}" for name in self.graders] + [
            f"{EVAL_PREFIX}retention_{when}"
        ] * bool(self.retention)
        if when == "before" and set(metric_names) <= run.record.get("metrics", {}).keys():
            return
        metrics = {}
        if self.graders:
            prompts = [prompt_text(conversation) for conversation in self.prompts]
            completions = [
                completion.text
                for completion in generate([conversation[:-1] for conversation in self.prompts])
            ]
            for name, grader in self.graders.items():
                metrics[f"{EVAL_PREFIX}graders/{name}_{when}"] = mean_grade(
                    name, grader, prompts, completions
                )
        if self.retention:
            completions = [
                completion.text
                for completion in generate([conversation[:-1] for conversation in self.retention])
            ]
            # Both sides are stripped: the expected reply was rendered, and the completion decoded.
            correct = [
                completion == conversation[-1].content
                for completion, conversation in zip(completions, self.retention, strict=True)
            ]
            metrics[f"{EVAL_PREFIX}retention_{when}"] = sum(correct) / len(correct)
        run.update(metrics=metrics)

    @property
    def summary(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        grades = {f"{EVAL_PREFIX}graders/{name}": (f"grader: {name}", ".1%") for name in self.graders}
        return grades | {f"{EVAL_PREFIX}retention": ("retention: exact match", ".1%")}


@dataclass(frozen=True)
class GenerationEvals:
    """All that a run generates before and after training: samples.jsonl, and the graders' completions."""

    samples: Samples
    graded: GenerationEval

    @classmethod
    def load(
        cls, settings: StageSettings, encoder: Encoder, conversations: Sequence[Conversation]
    ) -> "GenerationEvals":
        """Load the graders and the retention set, and select the prompts.

        Args:
            settings: the recipe's settings.
            encoder: renders the expected replies with the template.
            conversations: held-out conversations that end with the expected reply.

        Raises:
            UserError: a grader or the retention set cannot be loaded.
        """
        prompts = [row.messages for row in conversations]
        graded = load_generation_eval(
            settings.evaluate,
            prompts,
            encoder,
            seed=settings.train.seed,
            ignore_columns=tuple(settings.data.ignore_columns),
        )
        return cls(_select_samples(settings.evaluate, prompts, encoder), graded)

    @property
    def summary(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        return self.graded.summary

    def run(self, run: RunDirectory, generate: GenerateFn, when: When) -> None:
        """Generate and record samples and grades, ``before`` or ``after`` training.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        record = {"before": self.samples.record_before, "after": self.samples.record_after}[when]
        record(run, generate)
        self.graded.evaluate(run, generate, when)


def _select_samples(
    evaluate: EvaluateSettings, prompts: Sequence[Sequence[Message]], encoder: Encoder
) -> Samples:
    """Return the prompts of samples.jsonl, evenly spaced over the held-out conversations."""
    shown = evenly_spaced(len(prompts), evaluate.samples)
    others = [index for index in range(len(prompts)) if index not in shown]
    # The shown prompts come first; exact match may score more of them.
    count = max(evaluate.samples, evaluate.exact_match)
    selected = [render_reply(prompts[index], encoder) for index in [*shown, *others][:count]]
    return Samples(selected, evaluate.samples, scored=evaluate.exact_match > 0)


def mean_grade(name: str, grader: Grader, prompts: Sequence[str], completions: Sequence[str]) -> float:
    """Return a grader's mean over the completions that it does not skip.

    Raises:
        UserError: the grader raised, returned no number, or skipped every prompt.
    """
    where = f"evaluate.graders.{name}"
    grades = [
        call_user_function(grader, *pair, where=where) for pair in zip(prompts, completions, strict=True)
    ]
    scored = [value for value in grades if value is not None]
    if not scored:
        actual = f"None for each of {len(grades)} prompts"
        repair = "it grades other data: evaluate.graders={} omits the recipe's graders"
        raise UserError(Problem(where, actual, "a number for some of the held-out prompts", repair))
    return sum(scored) / len(scored)


def load_generation_eval(
    settings: EvaluateSettings,
    prompts: Sequence[Sequence[Message]],
    encoder: Encoder,
    *,
    seed: int,
    ignore_columns: tuple[str, ...] = (),
) -> GenerationEval:
    """Load a recipe's graders and retention set.

    Args:
        settings: the recipe's ``evaluate`` section.
        prompts: held-out conversations; graders see ``grader_rows`` of them, evenly spaced.
        encoder: renders the expected replies with the template.
        seed: selects the rows of the retention set.
        ignore_columns: columns of the retention set that count as absent.

    Raises:
        UserError: a grader or the retention set cannot be loaded.
    """
    graded = [prompts[index] for index in evenly_spaced(len(prompts), settings.grader_rows)]
    retention: list[list[Message]] = []
    if settings.retention is not None:
        source = SourceSpec(
            "evaluate.retention", settings.retention, "train", None, None, settings.retention_rows
        )
        source = replace(source, ignore_columns=ignore_columns)
        rows = load_conversations(source, 0, seed, DataReport()).rows
        retention = [render_reply(row.messages, encoder) for row in rows]
    return GenerationEval(
        load_graders(settings.graders),
        [render_reply(conversation, encoder) for conversation in graded],
        retention,
    )
