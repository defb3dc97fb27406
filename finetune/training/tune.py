"""The stage skeleton: pre-flight, evaluate, train, save, evaluate again; and the protocol of a method."""

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
    """The parts of a stage that differ between methods such as SFT, DPO and PPO."""

    @property
    def samples(self) -> Samples:
        """Return the prompts of samples.jsonl, answered before and after training."""
        ...

    @property
    def behaviour(self) -> Behaviour:
        """Return the evaluation of generated completions, before and after training."""
        ...

    def facts(self) -> dict[str, Any]:
        """Run the pre-flight and return run.json's initial sections; every refusal happens here."""
        ...

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Generate completions with the current policy."""
        ...

    def trainer(self) -> Trainer:
        """Build the engine's trainer."""
        ...

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record held-out metrics, ``before`` or ``after`` training."""
        ...

    def save(self) -> None:
        """Save the trained weights."""
        ...


def tune(job: Job) -> None:
    """Run SFT or continued pretraining.

    Args:
        ctx: context of a run that has not started.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    text = load_text(job)
    data = load_data(job, text)
    carry_out(job, Supervised(job, text, data, policy=load_policy(job)))


def carry_out(job: Job, tuning: Tuning, *, conclude: Callable[[], None] | None = None) -> None:
    """Evaluate, generate samples, train, save, evaluate and generate again.

    Args:
        ctx: context of a run that has not started.
        method: the method.
        finalize: called with all metrics recorded, before the report is written.

    Raises:
        UserError: a check failed.
        Interrupted: a signal came; a checkpoint was saved.
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
            processes.wait()  # rank 0 writes the metrics, which every rank reads
            conclude()
