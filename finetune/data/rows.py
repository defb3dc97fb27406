"""Rows of a source to what they mean, by the layout of the source; errors name file, line and field."""

from collections.abc import Collection, Iterable, Mapping
from typing import Generic

from finetune.data.columns import UnusedColumns
from finetune.data.fields import RowError
from finetune.data.layouts import Layout, Parsed, layout_values, parse_values
from finetune.data.readers import SourceRow
from finetune.recipe.errors import Problem, UserError

MAX_REPORTED = 5


class RowParser(Generic[Parsed]):
    """Parses the rows of one source by its layout, and remembers the columns that it does not use."""

    def __init__(
        self,
        layout: Layout[Parsed],
        columns: Mapping[str, str] | None,
        *,
        ignored: Collection[str] = (),
        unused: UnusedColumns | None = None,
    ) -> None:
        """Store how rows are read.

        Args:
            layout: the layout of the rows.
            columns: ``{our name: the source's name}``, the recipe's ``data.columns``.
            ignored: columns that count as absent, the recipe's ``data.ignore_columns``.
            unused: remembers the columns that are not read.
        """
        self.layout, self.columns, self.ignored = layout, columns, frozenset(ignored)
        self.unused = unused or UnusedColumns(layout)

    def parse(self, row: SourceRow) -> Parsed:
        """Return what a row means; raises RowError."""
        values = layout_values(row.columns, self.layout, self.columns, self.ignored)
        parsed = parse_values(values, self.layout)
        self.unused.see(values, row.location)
        return parsed

    def finish(self) -> list[str]:
        """Return the report's lines about unused columns, after the last row.

        Raises:
            UserError: a column that changes the meaning of a row is not read, nor ignored.
        """
        if problems := self.unused.problems(sorted(self.ignored)):
            raise UserError(problems)
        return self.unused.lines()


def parse_rows(
    rows: Iterable[SourceRow], layout: Layout[Parsed], columns: Mapping[str, str] | None
) -> list[Parsed]:
    """Parse rows outside of a data section by a layout.

    Raises:
        UserError: some rows do not fit the layout; the first few are listed with file, line and field.
    """
    parser = RowParser(layout, columns)
    parsed, problems = [], []
    for row in rows:
        try:
            parsed.append(parser.parse(row))
        except RowError as error:
            # Collected and not raised at once: the user sees several of the rows to repair.
            problems.append(row_problem(error, row.location))
    if problems:
        raise UserError(first_problems(problems, len(parsed) + len(problems)))
    return parsed


def row_problem(error: RowError, location: str) -> Problem:
    """Return the problem of a row that does not fit its layout."""
    return Problem(location, f"field '{error.field}': {error.actual}", error.expected, error.repair)


def first_problems(problems: list[Problem], num_rows: int) -> list[Problem]:
    """Return the first few of many rows' problems, and one that counts the rest."""
    num_more = len(problems) - MAX_REPORTED
    if num_more <= 0:
        return problems
    rest = Problem(
        f"and {num_more} more rows",
        f"{len(problems)} of {num_rows} rows do not fit",
        "one layout for all rows",
    )
    return [*problems[:MAX_REPORTED], rest]
