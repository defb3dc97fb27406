r"""Rejection sampling (best-of-n): sample completions, score them, fine-tune on the best ones.

RAFT (Dong et al. 2023, arXiv 2304.06767) and Llama 2's rejection sampling (Touvron et al. 2023,
arXiv 2307.09288, section 3.2.3): y* = argmax_k r(x, y_k) of n completions y_k ~ pi(. | x), then supervised
fine-tuning on (x, y*); the next round samples from the fine-tuned policy.
"""

from typing import TYPE_CHECKING

from align.rejection import settings
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result

PUBLIC = "llama2-chat"
"""Default recipe for a base other than the embedded one."""

Settings = settings.Settings
RULES = settings.RULES


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Fine-tune a policy on the best of its own completions.

    Args:
        recipe: the validated recipe.
        console: shows progress.
        force: start over if the run exists.
        command: command line, for the record.

    Raises:
        UserError: invalid input, before anything is written; or a reward function that fails on a completion.
        Interrupted: a signal arrived; completions are stored and a checkpoint is saved.
        NotFiniteError: loss, gradient or a reward is NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    stage_settings = recipe.settings
    assert isinstance(stage_settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    # Heavy libraries are imported only here: a finished run is returned without them.
    from align.rejection.method import RejectionSampling
    from align.rejection.metric_spec import rejection_metric_spec
    from align.rejection.policies import load_round_policies
    from align.rl.prompts import load_prompts
    from finetune.training.context import RunContext
    from finetune.training.loading import load_text_encoding

    ctx = RunContext(recipe, run, console, command, metric_spec=rejection_metric_spec(stage_settings))
    text = load_text_encoding(ctx)
    prompts = load_prompts(
        ctx, stage_settings.data, text, max_new_tokens=stage_settings.sampling.max_new_tokens
    )
    method = RejectionSampling(ctx, text, prompts, load_round_policies(ctx, text))
    with ctx.recorded(**method.metadata()):
        method.samples.record_before(run, method.generate)
        method.generation_eval.evaluate(run, method.generate, "before")
        method.evaluate(0)
        for round_index in method.rounds:
            method.run_round(round_index)
            method.evaluate(round_index)
        method.save()
        method.samples.record_after(run, method.generate)
        method.generation_eval.evaluate(run, method.generate, "after")
    return Result.of(run)
