"""A stage from its first measure to its last: what all stages do that tune a model which writes text."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import Trainer

from data_templates._segments import Message
from finetune.training import processes
from finetune.training.behaviour import Behaviour
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import load_data, load_policy, load_text
from finetune.training.samples import Samples
from finetune.training.supervised import Supervised


class Tuning(Protocol):
    """The pieces that a stage puts together: what is measured and shown, and what trains."""

    @property
    def samples(self) -> Samples:
        """Return the prompts that are answered before and after, for readers."""
        ...

    @property
    def behaviour(self) -> Behaviour:
        """Return what is measured of replies, before and after."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what run.json says before the first step; whatever can be refused is refused here."""
        ...

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Answer prompts with the model as it is."""
        ...

    def trainer(self) -> Trainer:
        """Return the engine's trainer."""
        ...

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record held-out measures, ``before`` or ``after`` training."""
        ...

    def save(self) -> None:
        """Save what was trained."""
        ...


def tune(job: Job) -> None:
    """Tune the recipe's policy on the recipe's rows of tokens.

    Args:
        job: the run, which has not started.

    Raises:
        UserError: the user's mistakes, before anything is written.
        Interrupted: a signal came; a checkpoint is there.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    text = load_text(job)
    data = load_data(job, text)
    carry_out(job, Supervised(job, text, data, policy=load_policy(job)))


def carry_out(job: Job, tuning: Tuning, *, conclude: Callable[[], None] | None = None) -> None:
    """Measure, answer, train, save, measure and answer again.

    Args:
        job: the run, which has not started.
        tuning: what is measured and shown, and what trains.
        conclude: what else is said of a whole run, before its report is written.

    Raises:
        UserError: a check failed.
        Interrupted: a signal came; a checkpoint is there.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    with job.started(**tuning.facts()):
        tuning.samples.before(job.run, tuning.answer)
        tuning.behaviour.measure(job.run, tuning.answer, "before")
        trainer = tuning.trainer()
        tuning.measure(trainer, "before")
        job.train(trainer)
        tuning.save()
        tuning.measure(trainer, "after")
        tuning.samples.after(job.run, tuning.answer)
        tuning.behaviour.measure(job.run, tuning.answer, "after")
        if conclude:
            processes.wait()  # until what was measured is written, which is read again
            conclude()
