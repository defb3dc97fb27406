"""The notebook's door: the command line's words as functions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.default_recipe import default_recipe
from finetune.recipe.quiet import quiet
from finetune.recipe.recipe import Recipe, load

if TYPE_CHECKING:
    from align.pipeline.plan import Pipeline
    from align.pipeline.running import PipelineResult
    from align.planning.plan import Plan
    from align.reward.scorer import RewardModel
    from finetune.training.result import Result
    from finetune.training.tuned import Tuned


def load_recipe(
    name: str | None = None,
    *,
    stage: str = "sft",
    base: str | None = None,
    data: str | list[dict[str, Any]] | None = None,
    adapter: str | None = None,
    start: str | Path | None = None,
    reward: str | Path | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Load a recipe, as ``llm-align STAGE NAME --base .. --data .. section.key=value`` does.

    Args:
        name: a recipe's name, or the path of a YAML file; None: the quickstart, or for another base the
            stage's recipe of public data.
        stage: the stage that will run it.
        base: short name, hub id or folder of the base model.
        data: hub id, file, folder, or a list of rows.
        adapter: name of an adapter.
        start: a finished run to go on from: its folder, its name, or ``stage/recipe``.
        reward: what replies are worth, for stages that maximise it: a finished run of stage reward, or
            ``reward/recipe``, or ``file.py:function``.
        out: the run directory.
        settings: further values, ``{"train.epochs": 3}``.

    Raises:
        UserError: every mistake that could be found.
    """
    shortcuts = {
        "model.base": base,
        "data.source": data,
        "adapter.method": adapter,
        "model.start": str(start) if start is not None else None,
        "reward.sources": str(reward) if reward is not None else None,
    }
    given = {key: value for key, value in shortcuts.items() if value is not None} | dict(settings or {})
    known, notes = (name, []) if name else default_recipe(stage, given)
    recipe = load(stage, known, shortcuts=given, out=Path(out) if out is not None else None)
    return replace(recipe, notes=[*notes, *recipe.notes])


def load_tuned(directory: str | Path) -> "Tuned":
    """Open a finished run: its model with the adapter, of any kind, and the encoder of its conversations.

    Args:
        directory: the run directory.

    Raises:
        UserError: the folder is no finished run.
    """
    quiet()
    from finetune.training import tuned

    return tuned.load_tuned(Path(directory))


def load_reward(directory: str | Path) -> "RewardModel":
    """Open a finished reward model; ``.score(prompts, completions)`` gives what each completion is worth.

    Args:
        directory: the run directory.

    Raises:
        UserError: the folder is no finished run of a reward model.
    """
    quiet()
    from align.reward import scorer

    return scorer.load_reward(Path(directory))


def run(recipe: Recipe, *, force: bool = False, command: str = "run(recipe)") -> "Result":
    """Run a recipe and return its result; a run that is finished already is returned at once.

    Where the recipe starts from another recipe's run (``model.start: sft/quickstart``), or is rewarded by
    one, that runs first.

    Args:
        recipe: what ``load_recipe`` gave.
        force: start over where a run of this recipe is there already.
        command: how the run was started, for its record.

    Raises:
        UserError: the user's mistakes, before anything is written.
        Interrupted: a signal came; the same call goes on from the checkpoint.
        NotFiniteError: loss or gradient became NaN or infinite.
        LostProcessError: one of several processes ended before its work did.
    """
    from rich.console import Console

    quiet()
    from align.start import ready
    from finetune.training.launch import run_stage

    console = Console()
    return run_stage(ready(recipe, console), console, force=force, command=command)


def plan(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> "Plan":
    """Return what a recipe will need, as ``llm-align plan`` prints it; nothing is loaded.

    Args:
        recipe: what ``load_recipe`` gave.
        gpu: the GPUs to plan for (``h100``, ``rtx4090``, ``24GB``, ``cpu``); None: this machine.
        gpus: how many of them.

    Raises:
        UserError: an unknown GPU, a base of unknown shape, settings that do not go together, faulty data.
    """
    from align.planning.machine import machine, together
    from align.planning.plan import plan_of

    device, count = machine(recipe.settings.train, gpu, gpus)
    return plan_of(together(recipe, device, count), device, count)


def load_pipeline(
    name: str,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> "Pipeline":
    """Load a pipeline with all of its recipes, as ``llm-align run NAME stage.section.key=value`` does.

    Args:
        name: a pipeline's name, or the path of a YAML file.
        base: short name, hub id or folder of the base model; another one than the embedded takes the stages
            of public data where the pipeline has such.
        out: the folder of the pipeline's report; the stages' runs lie in ``runs/``.
        settings: values in place of the recipes', ``{"sft.train.epochs": 3}``.

    Raises:
        UserError: every mistake that could be found in any stage.
    """
    from align.pipeline import plan

    folder = Path(out) if out is not None else None
    return plan.load_pipeline(name, base=base, out=folder, changes=settings)


def run_pipeline(
    pipeline: "Pipeline", *, force: bool = False, command: str = "run_pipeline(pipeline)"
) -> "PipelineResult":
    """Run a pipeline's stages, each on the runs of those before it; finished ones are not repeated.

    Args:
        pipeline: what ``load_pipeline`` gave.
        force: every stage starts over.
        command: how it was started, for its record.

    Raises:
        UserError: the user's mistakes; nothing is written where the first stage is refused.
        Interrupted: a signal came; the same call goes on from the checkpoint.
        NotFiniteError: a stage's loss or gradient became NaN or infinite.
    """
    from rich.console import Console

    quiet()
    from align.pipeline import running

    return running.run_pipeline(pipeline, Console(), force=force, command=command)
