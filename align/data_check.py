"""Read all rows that recipes name before anything runs, with the loaders of the stages and no tokenizer."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from align.preference.rows.comparison_rows import PREFERENCE_KINDS, ComparisonRows
from align.preference.settings import PreferenceSettings
from align.rl.prompt_rows import PromptRows
from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings
from finetune.data.conversation_rows import ConversationRows
from finetune.data.files import source_files
from finetune.data.layouts import CONVERSATION_LAYOUTS, DOCUMENT
from finetune.data.load import RowKind, SourceSpec, held_out_spec, load_rows, source_specs
from finetune.data.report import DataReport
from finetune.data.row_columns import RowColumns
from finetune.recipe.compatibility import caught
from finetune.recipe.discovery import local_path
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import DataSettings, StageSettings
from finetune.recipe.user_arguments import RowFunction, column_problems
from finetune.recipe.user_function import load_user_function
from finetune.training.stored_rows import row_sources

FIRST_ROWS = 1000
"""Rows of each source that are read where not all are."""
MAX_READ_BYTES = 24 * 2**20
"""Bytes of local files up to which a dry run reads all rows: a second or two."""


def data_problems(recipe: Recipe, *, dry_run: bool = False) -> list[Problem]:
    """Return the problems of a recipe's rows: training, held-out, retention and pretraining rows.

    Args:
        recipe: the loaded recipe.
        dry_run: read no more than the first rows of large files, and nothing of the Hub.
    """
    settings = recipe.settings
    if dry_run and hub_sources(settings):
        return []
    kind = row_kind(recipe.stage, settings.data)
    if problems := caught(_num_bytes, settings):
        return problems  # a folder without data files, or without the split
    if dry_run and _num_bytes(settings) > MAX_READ_BYTES:
        for index, spec in enumerate(_all_specs(settings.data)):
            first = replace(spec, first_rows=FIRST_ROWS, max_rows=None, select=None)
            problems += caught(kind.load, first, index, settings.train.seed, DataReport())
    else:
        problems += caught(load_rows, kind, settings.data, settings.train.seed, DataReport(), DataReport())
    for spec in _other_specs(settings):
        first = replace(spec, first_rows=FIRST_ROWS) if dry_run else spec
        problems += caught(ConversationRows().load, first, 0, settings.train.seed, DataReport())
    return problems


def function_problems(settings: StageSettings) -> list[Problem]:
    """Return the problems of reward functions and graders whose parameters no column fills.

    Nothing of the Hub is read: there the columns are unknown until the run starts.
    """
    rewards = dict(settings).get("rewards")
    sources = rewards.sources if isinstance(rewards, RewardsSettings) else []
    named = {
        f"rewards.sources[{index}].function": source.function
        for index, source in enumerate(sources)
        if source.function is not None
    }
    named |= {f"evaluate.graders.{name}": function for name, function in settings.evaluate.graders.items()}
    if not named or hub_sources(settings):
        return []
    problems: list[Problem] = []
    try:
        columns = RowColumns(settings.data, []).names
        for where, function in named.items():
            problems += column_problems(
                RowFunction(load_user_function(function, where=where)), columns, where=where
            )
    except UserError:
        # Of the rows or of a function: it is reported where these are read.
        return []
    return problems


def hub_sources(settings: StageSettings) -> list[str]:
    """Return the sources of rows that are on the Hub."""
    sources = (source for _, source in row_sources(settings))
    return [source for source in sources if isinstance(source, str) and local_path(source) is None]


def row_kind(stage: str, data: DataSettings) -> RowKind[Any]:
    """Return how a stage reads its rows: as comparisons, labeled completions, prompts or conversations."""
    if isinstance(data, PreferenceSettings):
        return ComparisonRows(data, PREFERENCE_KINDS.get(stage, "rankings"))
    return PromptRows() if isinstance(data, PromptSettings) else ConversationRows()


def _all_specs(data: DataSettings) -> Iterator[SourceSpec]:
    yield from source_specs(data)
    if (held_out := held_out_spec(data)) is not None:
        yield held_out


def _other_specs(settings: StageSettings) -> Iterator[SourceSpec]:
    """Yield the sources of conversations and texts besides the training data."""
    for key, source in row_sources(settings):
        if not key.startswith("data."):
            layouts = (
                (*CONVERSATION_LAYOUTS, DOCUMENT) if key == "pretraining.source" else CONVERSATION_LAYOUTS
            )
            ignored = tuple(settings.data.ignore_columns)
            yield SourceSpec(key, source, "train", None, None, layouts=layouts, ignore_columns=ignored)


def _num_bytes(settings: StageSettings) -> int:
    return sum(_source_bytes(spec) for spec in chain(_all_specs(settings.data), _other_specs(settings)))


def _source_bytes(spec: SourceSpec) -> int:
    if isinstance(spec.source, PythonRows):
        return spec.source.num_bytes
    path = local_path(spec.source)
    files = source_files(path, spec.text_format, spec.split) if path is not None else []
    return sum(file.stat().st_size for file in files)
