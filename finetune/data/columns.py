"""Columns of a source that its layout does not read: named in the report, or a reason to stop the run."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from finetune.data.contents import THOUGHTS
from finetune.data.fields import has_content
from finetune.data.layouts import MEDIA, SYSTEM_COLUMNS, Layout
from finetune.data.turns import ROLES, is_plain, is_untrainable, unused_keys
from finetune.recipe.errors import Problem

PARTIAL_FLAGS = ("train_detail", "training_detail")
"""axolotl's flags for parts of a reply: without them, the complete reply is trained."""
LABELS = ("label", "kto_tag", "score")
BAD_LABELS = {"false", "0", "0.0", "-1", "-1.0", "bad"}
GOOD_LABELS = {"true", "1", "1.0", "good"}
"""Values of a label that says good or bad. Others are classes (emotions), or ratings, which change no row."""


class UnusedColumns:
    """Columns, and keys of turns, that have content in some row and are not read.

    ``see`` is called once per row; then ``lines`` and ``problems`` say what was found.
    """

    def __init__(
        self,
        layout: Layout[Any],
        *,
        used: Collection[str] = (),
        unused: Collection[str] = (),
        source: str = "",
    ) -> None:
        """Store what is read.

        Args:
            layout: the layout of the rows.
            used: columns that something else reads, such as a rating.
            unused: columns that the layout reads, and this run does not use.
            source: the source's name for the lines; "" where there is one source only.
        """
        self._layout = layout
        self._read = frozenset({*layout.columns, *used} - {*unused, *layout.marks})
        self._members = {name: frozenset(keys) for name, keys in layout.members}
        self._source = source
        self._first: dict[str, str] = {}
        self._stops: dict[str, str] = {}
        self._bad_labels: set[str] = set()
        self._classes: set[str] = set()
        self._counts: dict[str, tuple[int, str]] = {}

    def see(self, values: Mapping[str, Any], location: str) -> None:
        """Remember which values of a row (``layout_values``) have content and are not read."""
        for name, value in values.items():
            is_read = name in self._read and (isinstance(value, str) or name not in THOUGHTS)
            if is_read or (name in self._first and name not in self._layout.stops):
                continue
            if has_content(value):
                self._first.setdefault(name, location)
                self._see_stop(name, values, location)
        for name in self._layout.turns:
            entries = values.get(name)
            entries = [entries] if isinstance(entries, dict) else entries
            if isinstance(entries, list):
                self._see_turns(name, entries, location)
        for name, keys in self._members.items():
            entries = values.get(name)
            for entry in entries if isinstance(entries, list) else ():
                items = entry.items() if isinstance(entry, dict) else ()
                extra = (key for key, value in items if key not in keys and has_content(value))
                self._see_keys(name, extra, location)
        self._see_system_column(values, location)

    def lines(self) -> list[str]:
        """Return what the report says about columns that are not used."""
        source = f"{self._source}: " if self._source else ""
        # A table's index column may have no name.
        names = ", ".join(name or "''" for name in self._first)
        lines = [f"{source}columns not used: {names}"] if names else []
        counts = self._counts.items()
        return lines + [f"{source}rows {what}: {n} (first: {first})" for what, (n, first) in counts]

    def problems(self, ignored: Collection[str] = ()) -> list[Problem]:
        """Return the problem of columns that change the meaning of a row, unless they are ignored."""
        stops = {name: first for name, first in self._stops.items() if name not in ignored}
        for name in LABELS:
            if name in self._classes or name not in self._bad_labels:
                stops.pop(name, None)
        if not stops:
            return []
        names, first = ", ".join(stops), next(iter(stops.values()))
        actual = f"column {names} has content that is not trained"
        if len(stops) > 1:
            actual = f"columns {names} have content that is not trained"
        expected = f"columns of layout {self._layout.name}, or data.ignore_columns"
        repair = f"'data.ignore_columns=[{', '.join([*ignored, *stops])}]'"
        if "chosen" in stops and "rejected" in stops:
            repair = f"llm-align dpo trains on pairs; or {repair}"
        elif "label" in stops or "kto_tag" in stops:
            repair = f"llm-align kto trains on labels; or {repair}"
        return [Problem(first, actual, expected, repair)]

    def _see_stop(self, name: str, values: Mapping[str, Any], location: str) -> None:
        if name not in self._layout.stops:
            return
        if name in LABELS:
            text = str(values[name]).strip().lower()
            self._bad_labels |= {name} if text in BAD_LABELS else set()
            self._classes |= {name} if text not in BAD_LABELS | GOOD_LABELS else set()
        # Published SFT splits of preference data: the conversation is the chosen one, and says so.
        conversation = values.get(self._layout.required[0])
        if name in ("chosen", "rejected") and values.get("chosen") == conversation:
            return
        self._stops.setdefault(name, location)

    def _see_turns(self, name: str, entries: list[Any], location: str) -> None:
        turns = [turn for turn in entries if isinstance(turn, dict) and not is_plain(turn)]
        for turn in turns:
            self._see_keys(name, unused_keys(turn), location)
        if any(map(is_untrainable, turns)):
            self._count("mark a turn as trained that is no reply (not trained)", location)

    def _see_keys(self, column: str, keys: Iterable[str], location: str) -> None:
        for key in keys:
            name = f"{column}[].{key}"
            self._first.setdefault(name, location)
            if key in MEDIA or key in PARTIAL_FLAGS:
                self._stops.setdefault(name, location)

    def _see_system_column(self, values: Mapping[str, Any], location: str) -> None:
        texts = [
            text for name in SYSTEM_COLUMNS if isinstance(text := values.get(name), str) and text.strip()
        ]
        for column in self._layout.turns if texts else ():
            entries = values.get(column)
            first = entries[0] if isinstance(entries, list) and entries else None
            if (
                not isinstance(first, dict)
                or ROLES.get(first.get("role") or first.get("from") or "") != "system"
            ):
                continue
            own = first.get("content") or first.get("value")
            if has_content(own) and any(own != text for text in texts):
                self._count("have a system turn, which replaces their system column", location)
                return

    def _count(self, what: str, location: str) -> None:
        count, first = self._counts.get(what, (0, location))
        self._counts[what] = (count + 1, first)
