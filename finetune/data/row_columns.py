"""Columns of the rows as their source has them, for user functions; read when a function asks for one."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from finetune.data.load import SourceSpec, held_out_spec, source_specs
from finetune.data.row_store import TextBuilder, TextColumn
from finetune.data.sources import iter_source
from finetune.recipe.settings import DataSettings

MAX_CACHED_ROWS = 4096


class RowColumns(Mapping[str, Mapping[str, Any]]):
    """Location of a row -> its columns. Values are JSON data; other values are their texts."""

    def __init__(self, settings: DataSettings, locations: Sequence[Iterable[str]]) -> None:
        """Store which rows may be asked for.

        Args:
            settings: the recipe's data section.
            locations: locations of rows, such as those of the training rows and of the held-out rows.
        """
        self._settings, self._locations = settings, locations
        self._decoded: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def names(self) -> list[str]:
        """Return the names of the columns of all sources, by which functions may ask for them."""
        names: dict[str, None] = {}
        for columns in self._first_rows():
            names |= dict.fromkeys(columns)
        return list(names)

    def __getitem__(self, location: str) -> Mapping[str, Any]:
        row = self._decoded.get(location)
        if row is None:
            index, lines = self._rows
            row = json.loads(lines[index[location]])
            assert isinstance(row, dict)
            # Several functions, and several completions, ask for the same row in turn.
            if len(self._decoded) >= MAX_CACHED_ROWS:
                self._decoded.clear()
            self._decoded[location] = row
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows[0])

    @cached_property
    def _rows(self) -> tuple[dict[str, int], TextColumn]:
        """Return the rows as lines of JSON, and the line of each location."""
        wanted = set(chain.from_iterable(self._locations))
        index: dict[str, int] = {}
        builder = TextBuilder()
        for spec in self._specs():
            for row in _iter_spec(spec):
                if row.location in wanted and row.location not in index:
                    index[row.location] = len(index)
                    columns = _with_our_names(row.columns, spec)
                    builder.append(json.dumps(columns, ensure_ascii=False, default=str))
        return index, builder.column()

    def _first_rows(self) -> Iterator[Mapping[str, Any]]:
        for spec in self._specs():
            for row in _iter_spec(spec):
                yield _with_our_names(row.columns, spec)
                break

    def _specs(self) -> list[SourceSpec]:
        held_out = held_out_spec(self._settings)
        return [*source_specs(self._settings), *([held_out] if held_out is not None else [])]


def _iter_spec(spec: SourceSpec) -> Iterator[Any]:
    return iter_source(
        spec.source, split=spec.split, revision=spec.revision, text_format=spec.text_format, key=spec.key
    )


def _with_our_names(columns: Mapping[str, Any], spec: SourceSpec) -> dict[str, Any]:
    """Return a row's columns, under the names of ``data.columns`` too."""
    renamed = {ours: columns.get(theirs) for ours, theirs in (spec.columns or {}).items()}
    return {**renamed, **columns}
