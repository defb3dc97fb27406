"""Commands that train: one per stage, and ``llm-align run`` for a pipeline."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from align.api import run, run_pipeline
from align.cli.arguments import RecipeArguments, recipe_arguments
from align.cli.completion import complete_base, complete_pipeline, complete_pipeline_words
from align.cli.exit_status import exit_on_stop
from align.default_recipe import QUICKSTART
from align.rl.rewards.settings import has_rewards_section
from finetune.distributed.rank import dist_info
from finetune.recipe.discovery import ALIASES, plugin_summary, recipe_names, stage_names, verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.renamed import STAGES, renamed_verb
from finetune.recipe.runs import FINISHED
from finetune.recipe.terminal import typed_command
from finetune.training.matching_run import REPLACED

if TYPE_CHECKING:
    from align.required_runs import PlannedRun

DRY_RUN_HELP = "Validate recipe, rows, required runs and launch; print the settings and run nothing."
ACCEPT_HELP = "Resume an interrupted run although the code of its reward functions or rules was changed."
REWARD_EXAMPLE = "reward.py:reward"

STAGE_EPILOG = """\b
Examples:
  llm-align {stage}                                    the bundled quickstart, offline, on the CPU
  llm-align {stage} {recipe} --base llama-2-7b{reward}
  llm-align {stage} {recipe} --data my.jsonl --adapter qlora train.epochs=1
  llm-align {stage} {recipe} --from sft-quickstart{reward}          start from a finished run
"""

RUN_EPILOG = """\b
Examples:
  llm-align run zephyr                                 the bundled model, offline, on the CPU
  llm-align run zephyr dpo.train.epochs=2
  llm-align run zephyr --base mistral-7b               the same stages on public data
  llm-align run my.yaml --dry-run                      validate without running
"""


def add_stage_commands(group: click.Group) -> None:
    """Add the command of each stage, its aliases, and the old commands, which name the new ones."""
    for stage, package in stage_names().items():
        group.add_command(_stage_command(stage, package))
    for alias, stage in ALIASES.items():
        command = _stage_command(stage, stage_names()[stage])
        command.hidden = True
        group.add_command(command, alias)
    for stage in STAGES:
        group.add_command(_renamed_command(stage))


def _stage_command(stage: str, package: str) -> click.Command:
    example = next((name for name in recipe_names(stage) if name != QUICKSTART), QUICKSTART)
    # A recipe's reward run is on the recipe's base: another base needs another reward.
    reward = f" --reward {REWARD_EXAMPLE}" if has_rewards_section(stage) else ""
    epilog = STAGE_EPILOG.format(stage=verb_of(stage), recipe=example, reward=reward)

    @click.command(verb_of(stage), help=plugin_summary(package, stage), epilog=epilog)
    @recipe_arguments(stage=stage)
    @click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run directory.")
    @click.option("--force", is_flag=True, help="Start over even if the run exists.")
    @click.option("--accept-changed-code", is_flag=True, help=ACCEPT_HELP)
    @click.option("--dry-run", is_flag=True, help=DRY_RUN_HELP)
    def command(
        selected: RecipeArguments, out: Path | None, force: bool, accept_changed_code: bool, dry_run: bool
    ) -> None:
        recipe = selected.load(out=out)
        if dry_run:
            _print_dry_run(recipe, force=force, accept_changed_code=accept_changed_code)
        else:
            _run_stage(recipe, force=force, accept_changed_code=accept_changed_code)

    return command


def _run_stage(recipe: Recipe, *, force: bool, accept_changed_code: bool) -> None:
    command = typed_command(sys.argv[1:])
    with exit_on_stop():
        result = run(recipe, force=force, accept_changed_code=accept_changed_code, command=command)
    from align.cli.runs import print_summary

    # Under a launcher every process runs the command; one of them prints.
    if dist_info().is_main:
        print_summary(result)


def _print_dry_run(recipe: Recipe, *, force: bool, accept_changed_code: bool) -> None:
    """Print the resolved settings and what the command would run, and where."""
    from align.cli.listing import print_recipe
    from align.data_check import hub_sources
    from align.required_runs import plan_runs
    from finetune.recipe.console import Terminal
    from finetune.training import auto_values

    *required, run = plan_runs(recipe, force=force, accept_changed_code=accept_changed_code)
    if not dist_info().is_main:
        return
    print_recipe(run.recipe)
    console = Terminal()

    def print_line(label: str, text: str) -> None:
        console.print(f"{label:9}{text}", highlight=False, soft_wrap=True, markup=False)

    for first in required:
        verb = "uses" if first.status == FINISHED else "first"
        print_line(verb, f"{first.recipe.stage} {first.recipe.name}: {_describe(first)}")
    print_line("run", f"{run.recipe.stage} {run.recipe.name}: {_describe(run)}")
    processes = run.target.processes
    strategy, _ = auto_values.strategy(run.recipe.settings.train.strategy, processes)
    device = "the CPU" if run.target.device == "cpu" else "one GPU each" if processes > 1 else "a GPU"
    for source in hub_sources(run.recipe.settings):
        print_line("data", f"{source} is on the Hub; its rows were not read")
    print_line("launch", f"{processes} process{'es' if processes > 1 else ''}, {strategy}, on {device}")
    print_line("dry run", "valid; nothing was run or written")


def _describe(run: "PlannedRun") -> str:
    """Return what a planned run's command would do, and its run directory."""
    if run.directory is None:
        return f"starts in {run.path} (the name depends on the run before it)"
    actions = {"": "starts in", FINISHED: "finished in", REPLACED: "starts over in"}
    if (longer := run.directory.longer) is not None:
        return f"trains on from step {longer.steps_done} in {run.path}"
    return f"{actions.get(run.status, f'resumes ({run.status}) in')} {run.path}"


def _renamed_command(stage: str) -> click.Command:
    """Return a stage's old command, which names the new one."""

    # An old command line has options; they must reach the message below, not fail as unknown.
    @click.command(stage, hidden=True, context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def command(words: tuple[str, ...]) -> None:
        """Raise UserError with the stage's new command."""
        expected = f"llm-align {verb_of(STAGES[stage])}"
        raise UserError(Problem(f"llm-align {stage}", renamed_verb(stage), expected))

    return command


@click.command("run", epilog=RUN_EPILOG)
@click.argument("name", metavar="PIPELINE", shell_complete=complete_pipeline)
@click.argument(
    "arguments", nargs=-1, metavar="[STAGE.SECTION.KEY=VALUE]...", shell_complete=complete_pipeline_words
)
@click.option(
    "--base", metavar="B", shell_complete=complete_base, help="Base model of the stages that start from one."
)
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Directory of the pipeline's report."
)
@click.option("--force", is_flag=True, help="Start every stage over.")
@click.option("--accept-changed-code", is_flag=True, help=ACCEPT_HELP)
@click.option("--dry-run", is_flag=True, help="Validate every stage and print the plan; run nothing.")
def run_command(
    name: str,
    arguments: tuple[str, ...],
    base: str | None,
    out: Path | None,
    force: bool,
    accept_changed_code: bool,
    dry_run: bool,
) -> None:
    """Run a pipeline: several stages in one file; a stage may start from an earlier stage's run.

    Finished stages are skipped; they are identified by settings and data. The same command resumes.
    """
    from align.pipeline.plan import resolve_pipeline, row_problems
    from align.pipeline.report import print_pipeline, print_pipeline_result

    pipeline = resolve_pipeline(name, base=base, out=out, arguments=arguments)
    if dry_run and (problems := row_problems(pipeline.entries, pipeline.recipes, dry_run=True)):
        raise UserError(problems)
    print_pipeline(pipeline, notes=dry_run)
    if dry_run:
        return
    with exit_on_stop():
        result = run_pipeline(
            pipeline,
            force=force,
            accept_changed_code=accept_changed_code,
            command=typed_command(sys.argv[1:]),
        )
    print_pipeline_result(result)
