"""Chain of hindsight (CoH): SFT on pairs of completions, each after a control text that says good or bad.

Liu et al. 2023 (arXiv 2302.02676), section 3: the model learns to write bad and good completions after the
control text of either; at inference the prompt carries that of good ones.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from align.preference.settings import ChainOfHindsightSettings, PreferenceSettings
from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result

PUBLIC = "hh"
"""The default recipe for a base model other than the embedded one."""


class Settings(StageSettings):
    """Recipe of chain of hindsight: preference data and control texts."""

    data: PreferenceSettings = PreferenceSettings()
    chain_of_hindsight: ChainOfHindsightSettings = ChainOfHindsightSettings()


def _check_control_texts(settings: Any) -> Iterator[Problem]:
    texts = settings.chain_of_hindsight
    if texts.good.strip() == texts.bad.strip():
        actual = "equal to chain_of_hindsight.good"
        yield Problem("chain_of_hindsight.bad", actual, "a different text", "chain_of_hindsight.bad=...")


RULES = (
    Rule(
        "control-texts",
        message="the control texts of good and bad completions differ",
        source="arXiv 2302.02676, section 3",
        find=_check_control_texts,
        reads=("chain_of_hindsight",),
    ),
)


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a model on chains of hindsight.

    Args:
        recipe: the validated recipe.
        console: shows progress.
        force: start over if the run exists.
        command: the command line, for run.json.

    Raises:
        UserError: invalid settings or data, before anything is written.
        Interrupted: stopped by a signal; a checkpoint is saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    settings = recipe.settings
    assert isinstance(settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    # Heavy libraries are imported only here: a finished run is returned without them.
    from finetune.training.supervised import SFT

    from align.preference.chain_of_hindsight import load_chains, with_control_suffix_encoder
    from finetune.training.context import RunContext
    from finetune.training.loading import load_policy, load_text_encoding
    from finetune.training.stage import run_stage

    ctx = RunContext(recipe, run, console, command)
    text = with_control_suffix_encoder(load_text_encoding(ctx), settings.chain_of_hindsight.good)
    data = load_chains(ctx, settings.data, settings.chain_of_hindsight, text)
    run_stage(ctx, SFT(ctx, text, data, policy=load_policy(ctx)))
    return Result.of(run)
