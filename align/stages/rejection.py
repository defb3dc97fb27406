r"""Best-of-n tuning: replies are drawn from the policy, judged by rewards, and the best of them learnt.

RAFT (Dong et al. 2023, arXiv 2304.06767) and Llama 2's rejection sampling (Touvron et al. 2023,
arXiv 2307.09288, section 3.2.3): y* = argmax_k r(x, y_k) of n replies y_k ~ pi(. | x), and then supervised
tuning on (x, y*); the next round draws from the policy that this has made.
"""

from typing import TYPE_CHECKING

from align.rejection import settings
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result

PUBLIC = "llama2-chat"
"""The recipe that serves another base than the embedded one where none is named."""

Settings = settings.Settings


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Tune a model on the best of its own replies.

    Args:
        recipe: what to do.
        console: where progress is shown.
        force: start over where a run of this recipe is there already.
        command: the words that started it, for the record.

    Raises:
        UserError: the user's mistakes, before anything is written; or a reward that fails on a reply.
        Interrupted: a signal came; what is drawn is kept, and a checkpoint is there.
        NotFiniteError: loss, gradient or a reward became NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    own = recipe.settings
    assert isinstance(own, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    from align.rejection.policies import load_policies
    from align.rejection.tuning import RejectionTuning
    from align.rejection.watched import watched
    from align.rl.prompts import load_prompts
    from finetune.training.job import Job
    from finetune.training.loading import load_text

    job = Job(recipe, run, console, command, watched=watched(own))
    text = load_text(job)
    prompts = load_prompts(job, own.data, text, room=own.sampling.max_new_tokens)
    tuning = RejectionTuning(job, text, prompts, load_policies(job, text))
    with job.started(**tuning.facts()):
        tuning.samples.before(run, tuning.answer)
        tuning.behaviour.measure(run, tuning.answer, "before")
        tuning.measure(0)
        for number in tuning.rounds:
            tuning.round(number)
            tuning.measure(number)
        tuning.save()
        tuning.samples.after(run, tuning.answer)
        tuning.behaviour.measure(run, tuning.answer, "after")
    return Result.of(run)
