"""Reference of the command line, from the commands themselves."""

import inspect
from collections.abc import Iterator

import click

from align.cli import cli
from align.cli.exit_status import (
    CHECK_FAILED,
    CLOSED_OUTPUT,
    DOES_NOT_FIT,
    INTERRUPTED,
    OUR_ERROR,
    USER_ERROR,
)
from tools.docs.markdown import code, table

PROGRAM = "llm-align"


def all_commands() -> str:
    """Return every command; those with the same options share a section."""
    groups: dict[str, list[click.Command]] = {}
    for command_ in _visible():
        groups.setdefault(_usage(command_) + _options(command_), []).append(command_)
    return "\n".join(_section(commands) for commands in groups.values())


def exit_status() -> str:
    """Return the exit statuses."""
    meanings = {
        0: "success",
        OUR_ERROR: "the run failed: an internal error, NaN, or a lost process",
        USER_ERROR: "an error in the recipe, the data, the command or a Python function of the recipe; "
        "nothing was written unless the run had started",
        DOES_NOT_FIT: "`plan`: the run does not fit in memory",
        CHECK_FAILED: "the run trained to the end and learned nothing, or the verdict is not what "
        "`eval --require` asks for; all files are kept",
        INTERRUPTED: "interrupted after saving a checkpoint; the same command resumes",
        CLOSED_OUTPUT: "nobody reads the output any more, as after `| head`; a run has saved a checkpoint",
    }
    return table(("status", "meaning"), [(str(status), text) for status, text in meanings.items()])


def _visible() -> Iterator[click.Command]:
    yield from (command_ for command_ in cli.commands.values() if not command_.hidden)


def _section(commands: list[click.Command]) -> str:
    names = [command_.name or "" for command_ in commands]
    # With the program's name, so that `list` in a signature of the Python API is no reference to it.
    heading = f"## {PROGRAM} {', '.join(names)}"
    helps = [(code(f"{PROGRAM} {command_.name}"), _help(command_)) for command_ in commands]
    text = f"{helps[0][1]}\n" if len(commands) == 1 else table(("command", "runs"), helps)
    usage = "\n".join(f"{PROGRAM} {command_.name} {_usage(command_)}" for command_ in commands)
    return f"{heading}\n\n{text}\n```text\n{usage}\n```\n\n{_options(commands[0])}"


def _usage(command_: click.Command) -> str:
    with click.Context(command_) as context:
        return " ".join(command_.collect_usage_pieces(context))


def _help(command_: click.Command) -> str:
    return inspect.cleandoc(command_.help or "").replace("``", "`")


def _options(command_: click.Command) -> str:
    rows = []
    with click.Context(command_) as context:
        for parameter in command_.get_params(context):
            record = parameter.get_help_record(context)
            # An argument without a text of its own is in the usage line already.
            if record is not None and record[1] and "--help" not in record[0]:
                rows.append((code(record[0]), record[1]))
    return table(("option", "meaning"), rows) if rows else ""
