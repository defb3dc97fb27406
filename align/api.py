"""Python API: the commands of ``llm-align`` as functions."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.default_recipe import default_recipe
from finetune.recipe.discovery import stage_of_verb
from finetune.recipe.one_run import one_run
from finetune.recipe.python_messages import for_python
from finetune.recipe.python_rows import from_python
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.recipe_name import DEFAULT_STAGE, resolve_name
from finetune.recipe.runs import find_run
from finetune.recipe.silence import filter_foreign_lines

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from align.evaluation.compare import Comparison
    from align.evaluation.evaluate import EvaluationResult
    from align.generation.generate_file import GeneratedRows
    from align.pipeline.directory import PipelineResult
    from align.pipeline.plan import Pipeline
    from align.planner.plan import Plan
    from align.reward.scorer import RewardModel
    from finetune.recipe.python_tables import ArrowStream
    from finetune.training.loaded_model import LoadedModel
    from finetune.training.result import Result

    Reward = str | Path | Callable[..., Any]
    Data = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | ArrowStream

filter_foreign_lines()  # before the functions below import the libraries


@for_python
def load_recipe(
    name: str | None = None,
    *,
    stage: str | None = None,
    base: str | None = None,
    data: "Data | None" = None,
    adapter: str | None = None,
    init_from: str | Path | None = None,
    reward: "Reward | Sequence[Reward | Mapping[str, Any]] | None" = None,
    graders: "Mapping[str, str | Callable[..., Any]] | None" = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Load a recipe, as ``llm-align STAGE NAME --base .. --data .. section.key=value`` does.

    Args:
        name: name of a recipe, ``stage/name``, path of a YAML file, or a run, whose recipe is loaded. None:
            the quickstart, or with another base than the bundled one, the stage's default recipe.
        stage: stage of the recipe. None: that of ``name``, or sft.
        base: short name, Hub id or folder of the base model.
        data: Hub id, file, folder, or rows: a list or a generator of dicts, a data frame (pandas, polars), a
            dataset (datasets), an Arrow table. A snapshot of rows is taken; the run directory gets a copy.
        adapter: name of an adapter.
        init_from: parent run: its run directory, its name, or ``stage/recipe``.
        reward: reward of the RL stages: a finished run of stage reward, ``reward/recipe``,
            ``file.py:function``, or a Python function; or several of them, each may be a mapping as in
            ``rewards.sources``: ``{"function": short, "weight": 0.1}``.
        graders: functions that grade completions of held-out prompts, by name: Python functions, or
            ``file.py:function``.
        out: the run directory.
        settings: further overrides, ``{"train.epochs": 3}``. Keys of data take rows too:
            ``{"data.held_out": rows, "data.mix": [{"source": rows, "weight": 2}]}``.

    Raises:
        UserError: all problems found.
    """
    shortcuts = {
        "model.base": base,
        "data.source": data,
        "adapter.method": adapter,
        "model.init_from": str(init_from) if init_from is not None else None,
        "rewards.sources": str(reward) if isinstance(reward, Path) else reward,
        "evaluate.graders": graders,
    }
    overrides = {key: value for key, value in shortcuts.items() if value is not None} | dict(settings or {})
    stage = stage_of_verb(stage) if stage is not None else None
    stage, name = resolve_name(name, stage=stage) if name else (stage or DEFAULT_STAGE, "")
    recipe_name, notes = (name, []) if name else default_recipe(stage, overrides)
    recipe = read_recipe(stage, recipe_name, shortcuts=overrides, out=Path(out) if out is not None else None)
    return replace(recipe, notes=[*notes, *recipe.notes])


@for_python
def load_tuned(directory: "str | Path | Result") -> "LoadedModel":
    """Load a finished run with any adapter: the model, and the encoder of its template.

    ``load_tuned(result).reply("What is 2 + 2?")`` generates a reply.

    Args:
        directory: the result of ``run``, the run directory, its name in ./runs, or a prefix of the name (the
            newest match); or a folder with an adapter of PEFT.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    from finetune.training import loaded_model

    return loaded_model.load_for_generation(_find_finished_run(directory))


@for_python
def load_reward(directory: "str | Path | Result") -> "RewardModel":
    """Load a finished reward model; ``.score(prompts, completions)`` returns the reward of each completion.

    Args:
        directory: the result of ``run``, the run directory, its name in ./runs, or a prefix of the name (the
            newest match).

    Raises:
        UserError: there is no such run, or it is not a finished run of stage reward.
    """
    from align.reward import scorer

    return scorer.load_reward_model(_find_finished_run(directory))


@for_python
def evaluate(
    model: "str | Path | Result",
    *,
    suites: Sequence[str] = (),
    against: "str | Path | Result | None" = None,
    alone: bool = False,
    limit: int | None = None,
    judge: str | None = None,
    cache: str | Path | None = None,
) -> "EvaluationResult":
    """Evaluate a run or a base on suites, as ``llm-align eval`` does.

    Args:
        model: the result of ``run``, a run's folder or name, or a base.
        suites: names of suites, or paths of YAML files; (): the run's held-out rows.
        against: run or base to compare with; None: what the run started from.
        alone: compare with nothing.
        limit: items of each suite at most.
        judge: of suites of task preference: ``run=NAME``, ``function=FILE.py:NAME``, ``endpoint=FILE.yaml``.
        cache: folder of the cached answers; None: in the user's cache.

    Raises:
        UserError: no such model or suite, or rows that do not fit.
    """
    from align.evaluation.evaluate import plan_evaluation, run_plan

    plan = plan_evaluation(
        _run_name(model),
        suites=suites,
        against=None if against is None else _run_name(against),
        alone=alone,
        limit=limit,
        judge=judge,
    )
    return run_plan(plan, cache=None if cache is None else Path(cache))


def _find_finished_run(name: "str | Path | Result") -> Path:
    return find_run(_run_name(name), where="run", recipes=False)[0]


def _run_name(name: "str | Path | Result") -> str:
    return str(name if isinstance(name, str | Path) else name.directory)


@for_python
def run(
    recipe: Recipe,
    *,
    force: bool = False,
    accept_changed_code: bool = False,
    callbacks: "Sequence[TrainerCallback | type[TrainerCallback]]" = (),
    command: str = "run(recipe)",
) -> "Result":
    """Run a recipe and return its result; a finished run is returned at once.

    If the recipe needs the run of another recipe, as parent run (``model.init_from: sft/quickstart``) or as
    reward, that recipe runs first.

    Args:
        recipe: from ``load_recipe``.
        force: start over even if a run of this recipe exists.
        accept_changed_code: resume an interrupted run although files of its user functions have changed.
        callbacks: transformers' ``TrainerCallback`` objects (rejection sampling calls them in each round).
        command: the command that is recorded in run.json.

    Raises:
        UserError: invalid settings or data; nothing was written. Or another run is in progress in this
            process.
        Interrupted: stopped by a signal; the same call resumes from the checkpoint.
        NotFiniteError: the loss or the gradient became NaN or infinite.
        LostProcessError: one of the run's processes died.
    """
    from finetune.recipe.console import Terminal, working

    console = Terminal()
    with one_run(f"{recipe.stage} {recipe.name}"), working(console, "preparing the run"):
        # The imports take seconds.
        from align.finish_run import report_early_finish
        from align.required_runs import resolve_required_runs
        from finetune.training.launch import launch_stage

        result = launch_stage(
            resolve_required_runs(recipe, console),
            console,
            force=force,
            accept_changed_code=accept_changed_code,
            command=command,
            callbacks=callbacks,
        )
        report_early_finish(result, recipe.settings, console)
        return result


@for_python
def finish(run: "str | Path | Result", *, accept_changed_code: bool = False) -> "Result":
    """Make a finished run of an interrupted one at its last checkpoint, without a further step.

    Args:
        run: the run directory, its name in ./runs, or a prefix of the name (the newest that is not finished).
        accept_changed_code: finish the run although files of its user functions have changed.

    Raises:
        UserError: there is no such run, it is in progress, it has no checkpoint, or its inputs have changed.
    """
    from align.finish_run import finish_run

    return finish_run(_run_name(run), accept_changed_code=accept_changed_code)


@for_python
def plan(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> "Plan":
    """Return the memory and time plan of a recipe, as ``llm-align plan`` prints it; nothing is loaded.

    Args:
        recipe: from ``load_recipe``.
        gpu: GPU to plan for (``h100``, ``rtx4090``, ``24GB``, ``cpu``); None: this machine.
        gpus: number of GPUs.

    Raises:
        UserError: unknown GPU, unknown base architecture, incompatible settings, or invalid data.
    """
    from align.planner.plan import make_plan
    from align.planner.target_device import resolve_for_device, target_device

    device, count = target_device(recipe.settings.train, gpu, gpus)
    return make_plan(resolve_for_device(recipe, device, count), device, count)


@for_python
def data(recipe: Recipe, *, rows: int = 3) -> dict[str, Any]:
    """Return the preview of a recipe's tokenized data, as ``llm-align data --json`` prints it.

    Args:
        recipe: from ``load_recipe``.
        rows: number of rows to show.

    Raises:
        UserError: invalid data, with the location and the field of the rows, or an unknown base.
    """
    from align.cli.data_preview import preview

    return preview(recipe, rows=rows)


@for_python
def generate(
    model: "str | Path | Result",
    rows: "Data",
    *,
    choices: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    template: str | None = None,
    force: bool = False,
) -> "GeneratedRows":
    """Generate a completion, or choose a label, for every row, as ``llm-align generate`` does.

    Args:
        model: a finished run (its result, its directory, its name in ./runs, or a prefix), or a base.
        rows: a file, a folder, a Hub id, or rows as in ``load_recipe``; each needs a prompt only.
        choices: labels to choose from, by their likelihood as replies. None: completions, also of a run
            that was trained on labels.
        columns: ``{our name: the file's name}``; the run's own mapping serves where its columns exist.
        out: JSON Lines or CSV by its suffix. The same call continues an interrupted one, and answers at once
            for a finished output, without its rows.
        limit: rows to answer; None: all.
        max_new_tokens: maximum tokens of a completion.
        temperature: 0 is greedy decoding.
        seed: of the samples.
        template: template of a base; None: the tokenizer's chat template, or ``plain`` without one.
        force: replace an output of another call.

    Raises:
        UserError: there is no such model, the rows have no prompts, or the output is of another call.
    """
    from align.generation import generate_file
    from align.generation.model_source import ModelSource
    from align.generation.settings import GenerateSettings

    settings = GenerateSettings(choices, max_new_tokens, temperature, seed, limit)
    return generate_file.generate_rows(
        ModelSource.of(_run_name(model), template=template),
        from_python(rows),
        settings,
        columns=columns,
        out=Path(out) if out is not None else None,
        force=force,
    )


@for_python
def compare(*runs: "str | Path | Result", html: str | Path | None = None) -> "Comparison":
    """Compare two or more runs or evaluations, as ``llm-align compare`` does.

    Args:
        *runs: runs of any status (result, directory, name in ./runs or prefix), or folders that ``eval`` has
            written for a base.
        html: file of a page to write.

    Raises:
        UserError: fewer than two, no such run, runs of different stages without evaluations of the same
            suites, or nothing in common.
    """
    from align.evaluation.compare import compare_models
    from align.evaluation.models import load_models

    comparison = compare_models(load_models([_run_name(run) for run in runs])[0])
    if html is not None:
        from align.evaluation.pages import comparison_page
        from finetune.training.pages import write_named_page

        write_named_page(comparison_page(comparison), Path(html))
    return comparison


@for_python
def load_pipeline(
    name: str,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> "Pipeline":
    """Load a pipeline with all of its recipes, as ``llm-align run NAME stage.section.key=value`` does.

    Args:
        name: name of a pipeline, or path of a YAML file.
        base: short name, Hub id or folder of the base model. Another base than the bundled one selects the
            stages on public data, if the pipeline has them.
        out: directory of the pipeline's report; the stages' runs are in ``runs/``.
        settings: overrides of the recipes' settings, ``{"sft.train.epochs": 3}``.

    Raises:
        UserError: all problems found in any stage.
    """
    from align.pipeline import plan

    folder = Path(out) if out is not None else None
    return plan.resolve_pipeline(name, base=base, out=folder, overrides=settings)


@for_python
def run_pipeline(
    pipeline: "Pipeline",
    *,
    force: bool = False,
    accept_changed_code: bool = False,
    command: str = "run_pipeline(pipeline)",
) -> "PipelineResult":
    """Run the stages of a pipeline; finished stages are skipped.

    Args:
        pipeline: from ``load_pipeline``.
        force: start every stage over.
        accept_changed_code: resume interrupted stages although files of their user functions have changed.
        command: the command that is recorded in pipeline.json.

    Raises:
        UserError: invalid settings or rows of any stage; nothing was written. Later, an error of a stage.
        Interrupted: stopped by a signal; the same call resumes from the checkpoint.
        NotFiniteError: a stage's loss or gradient became NaN or infinite.
    """
    from align.pipeline import runner
    from finetune.recipe.console import Terminal

    with one_run(f"pipeline {pipeline.name}"):
        return runner.run_all_stages(
            pipeline, Terminal(), force=force, accept_changed_code=accept_changed_code, command=command
        )
