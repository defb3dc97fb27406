"""Supervised tuning from its rows to its result: what all stages do that learn rows of tokens."""

from finetune.training.job import Job
from finetune.training.loading import load_data, load_policy, load_text
from finetune.training.supervised import Supervised


def tune(job: Job, fingerprint: str) -> None:
    """Tune the recipe's policy on the recipe's rows, measured and answering before and after.

    Args:
        job: the run, which has not started.
        fingerprint: what the run is made of beside its settings, for its record.

    Raises:
        UserError: the user's mistakes, before anything is written.
        Interrupted: a signal came; a checkpoint is there.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    text = load_text(job)
    data = load_data(job, text)
    tuning = Supervised(job, text, data, policy=load_policy(job))
    with job.started(fingerprint=fingerprint, **tuning.facts()):
        tuning.samples.before(job.run, tuning.answer)
        trainer = tuning.trainer()
        tuning.measure(trainer, "before")
        job.train(trainer)
        tuning.save()
        tuning.measure(trainer, "after")
        tuning.samples.after(job.run, tuning.answer)
