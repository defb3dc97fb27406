"""Helpers to read, compare and tokenize a few rows of preference data."""

from small_tokenizers import tokenizer

from align.preference.rows.comparisons import build_comparisons
from align.preference.rows.layouts import LABELED, RANKINGS
from align.preference.rows.prepare import prepare_preferences
from align.preference.settings import PreferenceSettings
from finetune.data.layouts import match_layout
from finetune.data.readers import SourceRow
from finetune.data.report import DataReport
from finetune.data.rows import parse_rows
from finetune.data.tokens import Encoder

BOTH = (*LABELED, *RANKINGS)


def read(row, columns=None):
    """Return the layout's name and the parsed row."""
    layout = match_layout(list(row), BOTH, columns=columns, where="rows", repair="")
    [judged] = parse_rows([SourceRow(row, "file:1")], layout, columns)
    return layout.name, judged


def compare(*rows, **settings):
    """Return the comparisons of some rows, and the report."""
    report = DataReport()
    judged = [(read(row)[1], f"file:{number}") for number, row in enumerate(rows, 1)]
    rows = build_comparisons(judged, PreferenceSettings(**settings), source=0, report=report)
    return list(rows), report


def prepared(rows, *, template="hh", tokens="qwen", max_length=512, kind="rankings", seed=0, **settings):
    """Return rows (or those of a file) tokenized, by default without cache."""
    data = PreferenceSettings(**{"source": rows, "template": template, "cache": False, **settings})
    encoder = Encoder(tokenizer(tokens), template)
    return prepare_preferences(data, encoder, max_length=max_length, seed=seed, kind=kind)


def pair(prompt="q", chosen="good", rejected="bad", **more):
    """Return a row with a prompt, a chosen and a rejected completion."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}
