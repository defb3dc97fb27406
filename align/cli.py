"""``llm-align`` command line (click). Heavy libraries are imported only inside the commands."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from align.api import run, run_pipeline
from align.default_recipe import QUICKSTART
from align.planner.command import plan
from align.recipe_words import recipe_from_arguments
from align.rl.rewards.settings import has_rewards_section
from finetune.distributed.rank import dist_info
from finetune.recipe.discovery import (
    ALIASES,
    plugin_summary,
    recipe_names,
    stage_names,
    stage_of_verb,
    verb_of,
)
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.renamed import STAGES, renamed_verb
from finetune.recipe.silence import silence_libraries

USER_ERROR, OUR_ERROR, INTERRUPTED = 2, 1, 130
FROM_HELP = "Finished run to start from: folder, name or prefix; or STAGE/RECIPE, which runs first if needed."
STAGE = "Stage of the recipe."
REWARD_HELP = "Reward: a finished reward run, reward/RECIPE, or file.py:function."

STAGE_EPILOG = """\b
Examples:
  llm-align {stage}                                    the embedded quickstart, offline, on the CPU
  llm-align {stage} {recipe} --base llama-2-7b
  llm-align {stage} {recipe} --data my.jsonl --adapter qlora train.epochs=1
  llm-align {stage} {recipe} --from sft-quickstart          start from a finished run
"""

RUN_EPILOG = """\b
Examples:
  llm-align run zephyr                                 the embedded model, offline, on the CPU
  llm-align run zephyr dpo.train.epochs=2
  llm-align run zephyr --base mistral-7b               the same stages on public data
  llm-align run my.yaml --dry-run                      validate without running
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llm-align")
def cli() -> None:
    """Adapt and align language models: one command per stage.

    Recipes are YAML files: `llm-align list` lists them, `llm-align show RECIPE` prints one.
    """


def main() -> None:
    """Run the command line; turn exceptions into messages and exit codes."""
    try:
        # Not standalone: click would print its own messages and choose its own exit codes.
        cli.main(standalone_mode=False)
    except UserError as error:
        _fail(f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}\n{error}", USER_ERROR)
    except click.ClickException as error:
        _fail(error.format_message(), USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted. Run the same command to resume from the last checkpoint", INTERRUPTED)


def _fail(message: str, status: int) -> None:
    dist = dist_info()
    if not dist.is_main:
        message = f"rank {dist.rank}: {message}"
    click.echo(f"llm-align: {message}", err=True)
    sys.exit(status)


def _stage_command(stage: str, package: str) -> click.Command:
    example = next((name for name in recipe_names(stage) if name != QUICKSTART), QUICKSTART)
    epilog = STAGE_EPILOG.format(stage=verb_of(stage), recipe=example)

    @click.command(verb_of(stage), help=plugin_summary(package, stage), epilog=epilog)
    @click.argument("arguments", nargs=-1, metavar="[RECIPE] [SECTION.KEY=VALUE]...")
    @click.option("--base", metavar="B", help="Base model: short name, hub id or folder.")
    @click.option("--data", metavar="D", help="Data: hub id, file or folder.")
    @click.option("--adapter", metavar="A", help="Adapter (see `llm-align list adapters`).")
    @click.option("--from", "init_from", metavar="RUN", help=FROM_HELP)
    @click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run directory.")
    @click.option("--force", is_flag=True, help="Start over even if the run exists.")
    def command(
        arguments: tuple[str, ...],
        base: str | None,
        data: str | None,
        adapter: str | None,
        init_from: str | None,
        out: Path | None,
        force: bool,
        reward: str | None = None,
    ) -> None:
        shortcuts = {
            "model.base": base,
            "data.source": data,
            "adapter.method": adapter,
            "model.init_from": init_from,
            "rewards.sources": reward,
        }
        overrides = {key: value for key, value in shortcuts.items() if value is not None}
        recipe = recipe_from_arguments(stage, arguments, overrides, out)
        _run_stage(recipe, force=force)

    if has_rewards_section(stage):
        # Before --out and --force: --help lists options in this order.
        command.params.insert(-2, click.Option(["--reward"], metavar="RUN", help=REWARD_HELP))
    return command


def _stage_option(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return the stage that --stage names, by its name or by its verb."""
    return stage_of_verb(value)


def _run_stage(recipe: Recipe, *, force: bool) -> None:
    with _exit_on_stop():
        result = run(recipe, force=force, command="llm-align " + " ".join(sys.argv[1:]))
    from align.summary import print_summary

    # Under a launcher every process runs the command; one of them prints.
    if dist_info().is_main:
        print_summary(result)


@contextmanager
def _exit_on_stop() -> Iterator[None]:
    """Turn an interrupted or failed run into a message and an exit code."""
    silence_libraries()
    from finetune.distributed.interrupts import Interrupted, LostProcessError, NotFiniteError

    try:
        yield
    except Interrupted as stop:
        _fail(str(stop), INTERRUPTED)
    except LostProcessError as error:
        _fail(f"{error}\n    repair:   run the same command to resume from the last checkpoint", OUR_ERROR)
    except NotFiniteError as error:
        repair = "lower train.learning_rate, or use model.precision=float32 (the run is marked as failed)"
        _fail(f"{error}\n    repair:   {repair}", OUR_ERROR)


@cli.command("run", epilog=RUN_EPILOG)
@click.argument("name", metavar="PIPELINE")
@click.argument("arguments", nargs=-1, metavar="[STAGE.SECTION.KEY=VALUE]...")
@click.option("--base", metavar="B", help="Base model of the stages that start from one.")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the pipeline's report."
)
@click.option("--force", is_flag=True, help="Start every stage over.")
@click.option("--dry-run", is_flag=True, help="Validate every stage and print the plan; run nothing.")
def run_(
    name: str, arguments: tuple[str, ...], base: str | None, out: Path | None, force: bool, dry_run: bool
) -> None:
    """Run a pipeline: several stages in one file, each on the runs of earlier ones.

    Finished stages are identified by content and skipped; the same command resumes after an interruption.
    """
    from align.pipeline.plan import resolve_pipeline
    from align.pipeline.summary import print_pipeline, print_pipeline_result

    pipeline = resolve_pipeline(name, base=base, out=out, arguments=arguments)
    print_pipeline(pipeline, notes=dry_run)
    if dry_run:
        return
    with _exit_on_stop():
        result = run_pipeline(pipeline, force=force, command="llm-align " + " ".join(sys.argv[1:]))
    print_pipeline_result(result)


@cli.command("list")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(kind: str | None, as_json: bool) -> None:
    """List recipes, pipelines, adapters, templates, losses, bases, stages and runs.

    With KIND, list that kind; `metrics` is listed only so.
    """
    from align.listing import ON_REQUEST, names_by_kind, print_listing

    listing = names_by_kind()
    if kind is not None and kind not in listing:
        raise click.UsageError(f"unknown kind '{kind}'; expected one of {', '.join(listing)}")
    kinds = [name for name in listing if name not in ON_REQUEST] if kind is None else [kind]
    chosen = {name: listing[name] for name in kinds}
    if as_json:
        click.echo(json.dumps(chosen, indent=1, ensure_ascii=False))
    else:
        print_listing(chosen)


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE] [SECTION.KEY=VALUE]...")
@click.option("--stage", default="sft", show_default=True, callback=_stage_option, help=STAGE)
@click.option("--from", "init_from", metavar="RUN", help=FROM_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--schema", is_flag=True, help="Print the stage's JSON Schema, for editors.")
def show(arguments: tuple[str, ...], stage: str, init_from: str | None, as_json: bool, schema: bool) -> None:
    """Show a recipe with the origin of every value."""
    from align.listing import print_recipe
    from finetune.recipe.schema import recipe_schema as json_schema
    from finetune.recipe.schema import setting_rows

    if schema:
        click.echo(json.dumps(json_schema(stage), indent=1, ensure_ascii=False))
        return
    recipe = recipe_from_arguments(
        stage, arguments, {"model.init_from": init_from} if init_from is not None else {}
    )
    if as_json:
        values = [
            {"key": key, "value": value, "origin": origin} for key, value, origin in setting_rows(recipe)
        ]
        click.echo(json.dumps({"stage": stage, "recipe": recipe.name, "settings": values}, indent=1))
    else:
        print_recipe(recipe)


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE] [SECTION.KEY=VALUE]...")
@click.option("--stage", default="sft", show_default=True, callback=_stage_option, help=STAGE)
@click.option("--base", metavar="B", help="Base model: short name, hub id or folder.")
@click.option("--data", "source", metavar="D", help="Data: hub id, file or folder.")
@click.option("--from", "init_from", metavar="RUN", help=FROM_HELP)
@click.option("--rows", type=click.IntRange(0), default=3, show_default=True, help="Rows to show.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write an HTML page.")
def data(
    arguments: tuple[str, ...],
    stage: str,
    base: str | None,
    source: str | None,
    init_from: str | None,
    rows: int,
    as_json: bool,
    html: Path | None,
) -> None:
    """Preview the tokenized data: rows with their loss mask, lengths, truncation, mixture, step count."""
    from rich.console import Console

    from align.data_terminal import print_header, print_preview

    shortcuts = {"model.base": base, "data.source": source, "model.init_from": init_from}
    overrides = {key: value for key, value in shortcuts.items() if value is not None}
    recipe = recipe_from_arguments(stage, arguments, overrides)
    console = Console()
    if not as_json:
        print_header(recipe, console)
    silence_libraries()
    from align.data_preview import preview, write_page

    preview_data = preview(recipe, rows=rows)
    if html is not None:
        write_page(preview_data, html)
    if as_json:
        click.echo(json.dumps(preview_data, indent=1, ensure_ascii=False))
    else:
        print_preview(preview_data, console, page=html)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--prompt", help="Answer this prompt and exit.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum tokens per reply.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="Sampling temperature; 0: greedy decoding."
)
def chat(directory: Path, prompt: str | None, max_new_tokens: int, temperature: float) -> None:
    """Chat with a finished run, using the template it was trained with."""
    silence_libraries()
    from align.chat import chat_loop, generate_once

    if prompt is None:
        chat_loop(directory, max_new_tokens=max_new_tokens, temperature=temperature)
    else:
        click.echo(generate_once(directory, prompt, max_new_tokens=max_new_tokens, temperature=temperature))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("source", metavar="FILE")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write each row with its rewards (JSON Lines).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def score(directory: Path, source: str, out: Path | None, as_json: bool) -> None:
    """Score the completions of a file with a reward model: per head, per rule, and in total."""
    silence_libraries()
    from align.score import score_and_print

    score_and_print(directory, source, out=out, as_json=as_json)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
def merge(directory: Path) -> None:
    """Merge a run's adapter into its base and save RUN/merged; `--base RUN` trains on from it."""
    silence_libraries()
    from finetune.training.merge import merge_run

    click.echo(f"merged   {merge_run(directory)}")
    click.echo(f"next     llm-align sft --base {directory}")


def _renamed_command(stage: str) -> click.Command:
    """Return the command of a stage's old verb, which names the new one."""

    # An old command line has options; they must reach the message below, not fail as unknown.
    @click.command(stage, hidden=True, context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def command(words: tuple[str, ...]) -> None:
        """Raise UserError with the stage's new verb."""
        expected = f"llm-align {verb_of(STAGES[stage])}"
        raise UserError(Problem(f"llm-align {stage}", renamed_verb(stage), expected))

    return command


for _stage, _package in stage_names().items():
    cli.add_command(_stage_command(_stage, _package))
for _alias, _stage in ALIASES.items():
    _command = _stage_command(_stage, stage_names()[_stage])
    _command.hidden = True
    cli.add_command(_command, _alias)
for _stage in STAGES:
    cli.add_command(_renamed_command(_stage))
cli.add_command(plan)
