"""Shell completion of ``llm-align``: the values of its options and arguments, and the scripts for the shells.

Click parses the command line and writes the scripts. Nothing here imports torch: a key press waits for it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)
from pydantic.fields import FieldInfo

from align.default_recipe import QUICKSTART
from align.pipeline.file import find_pipeline, pipeline_names, read_pipeline
from align.preference.losses.catalog import all_losses
from finetune.distributed.hardware import GPUS
from finetune.recipe import yaml_file
from finetune.recipe.bases import load_bases
from finetune.recipe.discovery import (
    ADAPTERS,
    TEMPLATES,
    adapter_settings,
    find_recipe,
    plugin_names,
    recipe_names,
    stage_names,
    stage_of_verb,
    verb_of,
)
from finetune.recipe.errors import UserError
from finetune.recipe.graders import grader_names
from finetune.recipe.parent_run import SCORING_STAGES
from finetune.recipe.recipe import stage_settings
from finetune.recipe.recipe_name import DEFAULT_STAGE, is_override
from finetune.recipe.runs import FINISHED, RUNNING, RUNS_FOLDER, list_runs
from finetune.recipe.settings import AdapterSettings, TrainSettings
from finetune.recipe.terminal import echo

Item = CompletionItem[str]
Completer = Callable[[click.Context, click.Parameter, str], list[Item]]
SHELLS = ("bash", "zsh", "fish")
KINDS = (
    "stages",
    "recipes",
    "pipelines",
    "adapters",
    "templates",
    "losses",
    "metrics",
    "bases",
    "suites",
    "runs",
)
"""The kinds that `llm-align list` lists."""
LOSS_KEY = "dpo.loss"
EPILOG = """\b
Examples:
  eval "$(llm-align completion bash)"                  in ~/.bashrc
  eval "$(llm-align completion zsh)"                   in ~/.zshrc, after compinit
  llm-align completion fish > ~/.config/fish/completions/llm-align.fish
"""


@click.command("completion", epilog=EPILOG)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell's completion script for commands, recipes, options, bases, runs, settings and values."""
    root = context.find_root()
    program = str(root.info_name)
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
    echo(shell_class(root.command, {}, program, variable).source())


class _CompleteWords(ShellComplete):
    """Completions are whole words: click completes the value of ``--base=ti`` without the option."""

    def get_completions(self, args: list[str], incomplete: str) -> list[Item]:
        items = super().get_completions(args, incomplete)
        option, equals, _ = incomplete.partition("=")
        if equals and option.startswith("-"):
            for item in items:
                item.value = f"{option}={item.value}"
        return items


@add_completion_class
class _Bash(_CompleteWords, BashComplete):
    """Bash, which also separates words at ``=`` and ``:``, and completes the part after the last of them."""

    # Bash puts a space after the only completion, but a value follows `train.epochs=`.
    source_template = BashComplete.source_template.replace(
        "    return 0\n", '    [[ "${COMPREPLY[*]}" == *[.=] ]] && compopt -o nospace\n\n    return 0\n'
    )
    typed = ""
    """The part of the word before the one that bash completes."""

    def get_completion_args(self) -> tuple[list[str], str]:
        parts = split_arg_string(os.environ["COMP_WORDS"])
        index = int(os.environ["COMP_CWORD"])
        words: list[str] = []
        is_continued = False
        for part in parts[: index + 1]:
            is_separator = set(part) <= set("=:")
            if words and (is_continued or is_separator):
                words[-1] += part
            else:
                words.append(part)
            is_continued = is_separator
        if index >= len(parts):  # the cursor is after a space
            return words[1:], ""
        rest = "" if is_continued else parts[index]
        self.typed = words[-1].removesuffix(rest)
        return words[1:-1], words[-1]

    def format_completion(self, item: Item) -> str:
        item.value = item.value.removeprefix(self.typed)
        return super().format_completion(item)


@add_completion_class
class _Zsh(_CompleteWords, ZshComplete):
    """Zsh, without the space that it puts after ``train.epochs=``."""

    source_template = (
        ZshComplete.source_template.replace(" -U\n", ' -U "${suffix[@]}"\n')
        .replace("compadd -U ", 'compadd -U "${suffix[@]}" ')
        .replace("    local -a response\n", "    local -a response suffix\n")
        .replace(
            '; do\n        if [[ "$type"',
            '; do\n        [[ $key == *[.=] ]] && suffix=(-S "")\n        if [[ "$type"',
        )
    )


@add_completion_class
class _Fish(_CompleteWords, FishComplete):
    """Fish."""


def _matching(values: Iterable[Item], incomplete: str) -> list[Item]:
    return [item for item in values if item.value.startswith(incomplete)]


def _items(names: Iterable[str]) -> list[Item]:
    return [CompletionItem(name) for name in names]


def complete_names(names: Callable[[], Iterable[str]]) -> Completer:
    """Return a completer for the names that a function lists."""
    return lambda context, parameter, incomplete: _matching(_items(names()), incomplete)


complete_base = complete_names(load_bases)
complete_adapter = complete_names(lambda: plugin_names(ADAPTERS))
complete_stage = complete_names(lambda: map(verb_of, stage_names()))
complete_gpu = complete_names(lambda: [*GPUS, "cpu"])
complete_strategy = complete_names(lambda: _choices(TrainSettings.model_fields["strategy"].annotation))
complete_kind = complete_names(lambda: KINDS)
complete_template = complete_names(lambda: [*plugin_names(TEMPLATES), "tokenizer"])
complete_pipeline = complete_names(pipeline_names)


def complete_file(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a path, in the shell's own way."""
    return [CompletionItem(incomplete, type="file")]


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a finished run: its name, or its path if a path is typed."""
    return _runs(incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_stopped_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a run that has stopped before its end: its name, or its path if a path is typed."""
    prefix = f"{RUNS_FOLDER}/" if incomplete.startswith(f"{RUNS_FOLDER}/") else ""
    runs = [run for run in list_runs() if run.record.get("status") not in (None, FINISHED, RUNNING)]
    items = [CompletionItem(f"{prefix}{run.path.name}", help=str(run.record["status"])) for run in runs]
    return _matching(items, incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a finished run or a base: a name, or a path."""
    items = _runs(incomplete) + _matching(_items(load_bases()), incomplete)
    return items or [CompletionItem(incomplete, type="dir")]


def complete_compared(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a run of any status that is not named yet, or a folder of an evaluation."""
    named = {
        str(name).removeprefix(f"{RUNS_FOLDER}/") for name in context.params.get(parameter.name or "") or ()
    }
    prefix = f"{RUNS_FOLDER}/" if incomplete.startswith(f"{RUNS_FOLDER}/") else ""
    runs = [run.path.name for run in list_runs() if not run.damage]
    evaluations = [file.parent.name for file in sorted(RUNS_FOLDER.glob("*/eval.json"))]
    names = [f"{prefix}{name}" for name in (*runs, *evaluations) if name not in named]
    return _matching(_items(names), incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_suite(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a suite, the last one of a list with commas, or a file."""
    # numpy, which the other commands do not need.
    from finetune.evaluation.suites import suite_names

    listed, comma, last = incomplete.rpartition(",")
    matching = _matching(_items(suite_names()), last)
    items = [CompletionItem(f"{listed}{comma}{item.value}", help=item.help) for item in matching]
    return items or [CompletionItem(incomplete, type="file")]


def complete_parent(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a finished run to start from, or ``stage/recipe``."""
    return _parents(incomplete)


def complete_reward(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a finished run of stage reward, ``reward/recipe``, or a grader."""
    return _rewards(incomplete)


def _runs(incomplete: str, *, stages: Sequence[str] = ()) -> list[Item]:
    prefix = f"{RUNS_FOLDER}/" if incomplete.startswith(f"{RUNS_FOLDER}/") else ""
    items = []
    for run in list_runs():
        if run.is_finished and (not stages or run.record["stage"] in stages):
            items.append(CompletionItem(f"{prefix}{run.path.name}", help=str(run.record.get("finished", ""))))
    return _matching(items, incomplete)


def _recipes(stages: Iterable[str], incomplete: str) -> list[Item]:
    references = [f"{stage}/{name}" for stage in stages for name in sorted(recipe_names(stage))]
    return _matching(_items(references), incomplete)


def _parents(incomplete: str) -> list[Item]:
    return _runs(incomplete) + _recipes(stage_names(), incomplete)


def _rewards(incomplete: str) -> list[Item]:
    graders = _matching(_items(grader_names()), incomplete)
    return _runs(incomplete, stages=SCORING_STAGES) + _recipes(SCORING_STAGES, incomplete) + graders


def complete_words(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Complete a command's ``RECIPE`` and ``section.key=value``."""
    words = tuple(context.params.get(parameter.name or "") or ())
    own = stage_of_verb(context.info_name or "")
    stage = context.params.get("stage") or (own if own in stage_names() else DEFAULT_STAGE)
    recipe = next((word for word in words if not is_override(word)), None)
    verb, _, name = (recipe or "").partition("/")
    if stage_of_verb(verb) in stage_names():
        stage, recipe = stage_of_verb(verb), name or QUICKSTART
    items = complete_setting(stage, recipe, words, incomplete, adapter=context.params.get("adapter"))
    if recipe is not None:
        return items
    if incomplete.startswith((".", "/", "~")):
        return [CompletionItem(incomplete, type="file")]
    references = (
        _recipes(stage_names(), incomplete) if "stage" in context.params and "/" in incomplete else []
    )
    return _matching(_items(sorted(recipe_names(stage))), incomplete) + references + items


def complete_pipeline_words(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[Item]:
    """Complete a pipeline's ``stage.section.key=value``."""
    try:
        entries = read_pipeline(find_pipeline(context.params["name"]))[0].stages
    except UserError:
        return []  # no such pipeline, or not a valid one
    entry, dot, setting = incomplete.partition(".")
    if not dot or entry not in entries:
        return _matching(_items(f"{name}." for name in entries), incomplete)
    stage, _, recipe = entries[entry].recipe.partition("/")
    words = context.params.get(parameter.name or "") or ()
    own_words = [word.removeprefix(f"{entry}.") for word in words if word.startswith(f"{entry}.")]
    items = complete_setting(stage, recipe, own_words, setting) if stage in stage_names() else []
    for item in items:
        item.value = f"{entry}.{item.value}"
    return items


def complete_setting(
    stage: str, recipe: str | None, words: Iterable[str], incomplete: str, *, adapter: str | None = None
) -> list[Item]:
    """Return the completions of ``section.key=value``: sections, then a section's keys, then a key's values.

    Args:
        stage: the stage, whose sections they are.
        recipe: name or path of the recipe, which may choose adapter and loss.
        words: the other arguments, which may choose them too.
        incomplete: the typed part of the word.
        adapter: the value of --adapter.
    """
    section, dot, rest = incomplete.partition(".")
    fields = stage_settings(stage).model_fields
    if not dot or section not in fields:
        return _matching(_items(f"{name}." for name in fields), incomplete)
    chosen = dict(word.split("=", 1) for word in words if is_override(word))
    model: Any = fields[section].annotation
    if section == "adapter":
        method = adapter or chosen.get("adapter.method") or _recipe_value(stage, recipe, "adapter", "method")
        model = adapter_settings(str(method) if method in _adapters() else AdapterSettings().method)
    if "=" not in rest:
        keys = [CompletionItem(f"{section}.{key}=", help=field.description) for key, field in _fields(model)]
        if incomplete.startswith(f"{LOSS_KEY}."):
            loss = chosen.get(LOSS_KEY) or _recipe_value(stage, recipe, *LOSS_KEY.split("."))
            keys = _loss_settings(loss.get("name") if isinstance(loss, dict) else loss)
        return _matching(keys, incomplete)
    key, _, value = rest.partition("=")
    values = _values(f"{section}.{key}", dict(_fields(model)).get(key), value)
    return _matching(_items(f"{section}.{key}={text}" for text in values), incomplete)


def _fields(model: Any) -> list[tuple[str, FieldInfo]]:
    return list(model.model_fields.items())


def _adapters() -> list[str]:
    return plugin_names(ADAPTERS)


def _recipe_value(stage: str, recipe: str | None, section: str, key: str) -> Any:
    """Return a value of a recipe's file; None without one."""
    try:
        content = yaml_file.read_yaml(find_recipe(stage, recipe or QUICKSTART))[0]
    except UserError:
        return None  # no such recipe, or not a valid one
    values = content.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _loss_settings(loss: str | None) -> list[Item]:
    losses = all_losses()
    return _items(f"{LOSS_KEY}.{key}=" for key in losses[loss if loss in losses else "dpo"].defaults)


def _values(key: str, field: FieldInfo | None, typed: str) -> list[str]:
    """Return the values of a setting: registered names, or the choices of its type."""
    names: dict[str, Callable[[], Iterable[str]]] = {
        "adapter.method": _adapters,
        "data.template": lambda: plugin_names(TEMPLATES),
        "model.base": load_bases,
        "model.init_from": lambda: [item.value for item in _parents(typed)],
        "rewards.sources": lambda: [item.value for item in _rewards(typed)],
        LOSS_KEY: all_losses,
    }
    if key in names:
        return list(names[key]())
    choices = list(_choices(field.annotation)) if field is not None else []
    return choices if choices != ["null"] else []


def _choices(annotation: Any) -> Iterator[str]:
    """Yield the choices of a type: those of Literal, true and false, null."""
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is NoneType:
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        # Of a union and of Annotated; the choices in a list or a dict are not values of the key.
        for part in get_args(annotation) if get_origin(annotation) not in (list, dict) else ():
            yield from _choices(part)
