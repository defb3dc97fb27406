"""Run stage rloo or grpo."""

from rich.console import Console

from align.online.loading import load_judged
from align.online.settings import GrpoSettings, OnlineSettings, RlooSettings
from align.online.tuning import OnlineTuning
from align.online.watched import watched
from align.rl.prompts import load_prompts
from align.rl.rewards.settings import LENGTH
from finetune.recipe.recipe import Recipe
from finetune.training.job import Job
from finetune.training.loading import load_text
from finetune.training.run_directory import RunDirectory
from finetune.training.tune import carry_out


def learn_online(
    recipe: Recipe, run: RunDirectory, align: RlooSettings | GrpoSettings, *, console: Console, command: str
) -> None:
    """Train a policy with RLOO or GRPO on TRL's trainer.

    Args:
        recipe: the validated recipe.
        run: the run directory.
        loss_settings: the section of the stage, RLOO or GRPO.
        console: shows progress.
        command: command line, for the record.
    """
    settings = recipe.settings
    assert isinstance(settings, OnlineSettings)
    names = [source.called for source in settings.reward.sources]
    names += [LENGTH] if settings.reward.length_penalty else []
    job = Job(recipe, run, console, command, watched=watched(names), may_idle=True)
    text = load_text(job)
    prompts = load_prompts(job, settings.data, text, room=settings.sampling.max_new_tokens)
    carry_out(job, OnlineTuning(job, text, prompts, load_judged(job, text, settings.reward), align))
