"""``llm-align`` command line (click). Heavy libraries are imported only inside the commands."""

import sys
from pathlib import Path
from typing import NoReturn

import click

from align.cli.arguments import RecipeArguments, foreign_options, recipe_arguments, run_argument
from align.cli.compare import compare
from align.cli.completion import (
    complete_file,
    complete_kind,
    complete_run,
    complete_stopped_run,
    completion,
)
from align.cli.evaluate import evaluate
from align.cli.exit_status import (
    CHECK_FAILED,
    INTERRUPTED,
    USER_ERROR,
    ErrorReporting,
    OutputGroup,
    exit_on_stop,
    fail,
    format_traceback,
    traceback_option,
)
from align.cli.generate import generate
from align.cli.plan import plan
from align.cli.stage_commands import add_stage_commands, run_command
from finetune import __version__
from finetune.distributed.rank import dist_info
from finetune.recipe.checkpoint_folder import run_of_checkpoint
from finetune.recipe.errors import CheckFailedError, UserError
from finetune.recipe.peft_folder import is_peft_folder
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import PROGRAM, command_line, echo, echo_json, prepare_terminal

SHOW_EPILOG = """\b
Examples:
  llm-align show alpaca
  llm-align show dpo/hh --from sft-alpaca              a recipe of another stage, on a finished run
  llm-align show sft-alpaca                            the resolved recipe of a run
"""
DATA_EPILOG = """\b
Examples:
  llm-align data quickstart --data my.jsonl --rows 5
  llm-align data ppo/hh --from sft-alpaca --data prompts.jsonl
  llm-align data sft-alpaca                            the data of a run
"""
FINISH_EPILOG = """\b
Examples:
  llm-align finish sft-alpaca                          at its last checkpoint
  llm-align finish runs/sft-alpaca-1a2b3c4d --json
"""
FINISH_ACCEPT_HELP = "Finish the run although the code of its reward functions, rules or graders was changed."


@click.group(cls=OutputGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune and align language models: one command per stage.

    Recipes are YAML files: `llm-align list` lists them, `llm-align show RECIPE` prints one.
    """


def main() -> None:
    """Run the command line; turn exceptions into messages and exit codes."""
    prepare_terminal()
    reporting = ErrorReporting()
    try:
        # Not standalone: click would print its own messages and choose its own exit codes.
        cli.main(prog_name=PROGRAM, standalone_mode=False, obj=reporting)
    except CheckFailedError as error:
        fail(str(error), CHECK_FAILED)
    except UserError as error:
        if reporting.traceback:
            echo(format_traceback(error), err=True)
        _fail_with_problems(error)
    except click.NoSuchOption as error:
        if problems := foreign_options(error, sys.argv[1:]):
            _fail_with_problems(UserError(problems))
        fail(error.format_message(), USER_ERROR)
    except click.ClickException as error:
        fail(error.format_message(), USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted. The same command resumes from the last checkpoint, if there is one", INTERRUPTED)


def _fail_with_problems(error: UserError) -> NoReturn:
    fail(f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}\n{error}", USER_ERROR)


@cli.command("list")
@click.argument("kind", required=False, shell_complete=complete_kind)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(kind: str | None, as_json: bool) -> None:
    """List recipes, pipelines, adapters, templates, losses, bases, suites, stages and runs.

    With KIND, list only that kind. Metrics are listed only by `llm-align list metrics`.
    """
    from align.cli.listing import LISTINGS, ON_REQUEST, names_by_kind, print_listing

    if kind is not None and kind not in LISTINGS:
        raise click.UsageError(f"unknown kind '{kind}'; expected one of {', '.join(LISTINGS)}")
    chosen = names_by_kind([name for name in LISTINGS if name not in ON_REQUEST] if kind is None else [kind])
    if as_json:
        echo_json(chosen)
    else:
        print_listing(chosen)


@cli.command(epilog=SHOW_EPILOG)
@recipe_arguments()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--schema", is_flag=True, help="Print the stage's JSON Schema, for editors.")
def show(selected: RecipeArguments, as_json: bool, schema: bool) -> None:
    """Show a recipe, or the recipe of a run, with the origin of every value."""
    from align.cli.listing import print_recipe
    from finetune.recipe.schema import recipe_schema as json_schema
    from finetune.recipe.schema import setting_rows

    if schema:
        stage, _ = selected.resolve_stage()
        echo_json(json_schema(stage))
        return
    recipe = selected.load()
    if as_json:
        values = [
            {"key": key, "value": value, "origin": origin} for key, value, origin in setting_rows(recipe)
        ]
        echo_json({"stage": recipe.stage, "recipe": recipe.name, "settings": values})
    else:
        print_recipe(recipe)


@cli.command(epilog=DATA_EPILOG)
@recipe_arguments()
@click.option("--rows", type=click.IntRange(0), default=3, show_default=True, help="Rows to show.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write the preview as an HTML page."
)
def data(selected: RecipeArguments, rows: int, as_json: bool, html: Path | None) -> None:
    """Preview the tokenized data: rows with loss mask, lengths, truncation, mixture, number of steps."""
    from align.cli.data_terminal import print_header, print_preview
    from finetune.recipe.console import Terminal, error_terminal, working
    from finetune.recipe.hub import check_hub

    recipe = selected.load()
    console = Terminal()
    if not as_json:
        print_header(recipe, console)
    silence_libraries()
    check_hub(recipe.settings)  # before torch is imported
    with working(error_terminal() if as_json else console, "reading and tokenizing the rows"):
        from align.cli.data_preview import preview, write_page

        preview_data = preview(recipe, rows=rows)
    if html is not None:
        write_page(preview_data, html)
    if as_json:
        echo_json(preview_data)
    else:
        print_preview(preview_data, console, page=html)


@cli.command()
@click.argument("directory", metavar="RUN", callback=run_argument, shell_complete=complete_run)
@click.option("--prompt", help="Answer this prompt and exit.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum tokens per reply.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="Sampling temperature; 0: greedy decoding."
)
def chat(directory: Path, prompt: str | None, max_new_tokens: int, temperature: float) -> None:
    """Chat with a finished run, using the template it was trained with."""
    silence_libraries()
    from align.cli.runs import chat_loop, generate_once

    if prompt is None:
        chat_loop(directory, max_new_tokens=max_new_tokens, temperature=temperature)
    else:
        echo(generate_once(directory, prompt, max_new_tokens=max_new_tokens, temperature=temperature))


@cli.command()
@click.argument("directory", metavar="RUN", callback=run_argument, shell_complete=complete_run)
@click.argument("source", metavar="FILE", shell_complete=complete_file)
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
    from align.cli.runs import score_and_print

    score_and_print(directory, source, out=out, as_json=as_json)


@cli.command()
@click.argument("directory", metavar="RUN", callback=run_argument, shell_complete=complete_run)
def merge(directory: Path) -> None:
    """Merge a run's adapter into its base and save RUN/merged; `--base RUN` trains a new adapter on it."""
    silence_libraries()
    from finetune.recipe.console import error_terminal, working

    with working(error_terminal(), "merging"):
        from finetune.training.merge import merge_run

        merged = merge_run(directory, report=lambda result: echo(result.line()))
    echo(f"merged   {merged}")
    base = merged if is_peft_folder(directory) else run_of_checkpoint(directory) or directory
    echo(f"next     {command_line('sft', '--base', base)}")


@cli.command(epilog=FINISH_EPILOG)
@click.argument("name", metavar="RUN", shell_complete=complete_stopped_run)
@click.option("--accept-changed-code", is_flag=True, help=FINISH_ACCEPT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def finish(name: str, accept_changed_code: bool, as_json: bool) -> None:
    """Make a finished run of an interrupted one at its last checkpoint; no step is trained.

    The weights are saved, reopened and evaluated as at the end of a run, with samples, findings and report.
    """
    with exit_on_stop():
        from align.cli.runs import print_summary, result_json
        from align.finish_run import finish_run
        from finetune.recipe.console import error_terminal

        result = finish_run(
            name, accept_changed_code=accept_changed_code, console=error_terminal() if as_json else None
        )
    if as_json:
        echo_json(result_json(result))
    elif dist_info().is_main:
        print_summary(result)


add_stage_commands(cli)
cli.add_command(run_command)
cli.add_command(plan)
cli.add_command(generate)
cli.add_command(compare)
cli.add_command(evaluate)
cli.add_command(completion)
for command in cli.commands.values():
    command.params.append(traceback_option())
