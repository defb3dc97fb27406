"""Documents for continued pretraining: concatenated and chunked, or packed; every token is trained on.

``packing: false``: all documents concatenated, each with the BOS and EOS of the tokenizer, and chunked into
blocks of ``max_length``; attention is not masked between documents, EOS separates them (GPT-3: Brown et al.
2020, arXiv 2005.14165, appendix B). ``packing: true``: complete documents (longer ones in pieces) share a row
of at most ``max_length``; position ids restart at each, and attention is masked between them. The first token
of a block, or of a piece, has no prefix to be predicted from and carries no loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_templates._segments import Message
from finetune.data.blocks import block_starts, packed_pieces
from finetune.data.conversation import Conversation
from finetune.data.dataset import Prepared, TokenizedRows, prepare, tell_shares
from finetune.data.files import data_files, is_text
from finetune.data.layouts import DOCUMENT
from finetune.data.report import DataReport
from finetune.data.sources import read_source
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.paths import local_path
from finetune.recipe.settings import DataSettings, DocumentSettings

WHOLE = 2**31 - 1
"""No limit: documents are tokenized without truncation, then chunked or packed."""

SHOWN = 200
"""Characters of a sample prompt (the start of a passage), and of the reference continuation."""

SHORTEST = 16
"""Minimum number of characters of a passage."""

STARTS = 64
"""Number of held-out passages used as sample prompts."""


def prepare_any(settings: DataSettings, encoder: Encoder, *, max_length: int, seed: int) -> Prepared:
    """Prepare a data section: documents for continued pretraining, conversations otherwise.

    Raises:
        UserError: a source cannot be read, or no trainable row remains.
    """
    if isinstance(settings, DocumentSettings):
        return prepare_documents(settings, encoder, max_length=max_length, seed=seed)
    return prepare(settings, encoder, max_length=max_length, seed=seed)


def prepare_documents(
    settings: DocumentSettings, encoder: Encoder, *, max_length: int, seed: int
) -> Prepared:
    """Load, split and tokenize documents, and chunk or pack them into rows.

    For a single text file that is one document, the held-out split is its tail.

    Args:
        settings: the recipe's data section.
        encoder: tokenizer, and the template of rows that are conversations.
        max_length: tokens per row.
        seed: seed of the held-out split.

    Raises:
        UserError: a source cannot be read, no trainable row remains, or a template is set for plain texts.
    """
    book = _book(settings)
    data = (
        _cut_book(book, settings, encoder, seed)
        if book is not None
        else prepare(settings, encoder, max_length=WHOLE, seed=seed)
    )
    _refuse_template(settings, data.report)
    train = in_rows(data.train, max_length, packing=settings.packing)
    held_out = None
    if data.held_out is not None:
        held_out = in_rows(data.held_out, max_length, packing=settings.packing)
    report = _report(data, train, held_out)
    # A template would render the start of a plain text as a user turn.
    asked = [row for row in data.prompts if settings.template == "plain" or not row.document]
    return Prepared(train, held_out, _starts(asked), report)


def in_rows(documents: TokenizedRows, size: int, *, packing: bool) -> TokenizedRows:
    """Return rows of at most ``size`` tokens: chunks of the token stream, or packed documents."""
    ids = documents.arrays["input_ids"]
    if packing:
        return _packed(documents, packed_pieces(documents.lengths, size))
    borders = np.asarray(block_starts(len(ids), size), dtype=np.int64)
    trained = np.ones(borders[-1], dtype=bool)
    # The first token of each block: its prefix, if any, is in the block before.
    trained[borders[:-1]] = False
    arrays = {"input_ids": ids[: borders[-1]], "trained": trained, "starts": borders}
    return _named(arrays, documents, borders[:-1])


def _packed(documents: TokenizedRows, rows: list[list[tuple[int, int]]]) -> TokenizedRows:
    flat = [piece for row in rows for piece in row]
    lengths = [end - start for start, end in flat]
    parts = np.asarray(list(accumulate(lengths, initial=0)), dtype=np.int64)
    starts = np.asarray(list(accumulate((len(row) for row in rows), initial=0)))
    ids = np.concatenate([documents.arrays["input_ids"][start:end] for start, end in flat])
    trained = np.ones(len(ids), dtype=bool)
    trained[parts[:-1]] = False
    arrays = {"input_ids": ids, "trained": trained, "starts": parts[starts], "parts": parts[:-1]}
    return _named(arrays, documents, [row[0][0] for row in rows])


def _named(
    arrays: dict[str, np.ndarray], documents: TokenizedRows, begins: Sequence[int] | np.ndarray
) -> TokenizedRows:
    """Return rows with the location and source of the document in which each begins."""
    # side="right": a row that begins exactly at a document's offset belongs to that document.
    first = np.searchsorted(documents.arrays["starts"], begins, side="right") - 1
    places = [documents.places[index] for index in first]
    return TokenizedRows(arrays, places, [documents.sources[index] for index in first])


def _refuse_template(settings: DocumentSettings, report: DataReport) -> None:
    if settings.template != "plain" and all(source.layout == DOCUMENT.name for source in report.sources):
        found = f"'{settings.template}', but the data is plain text"
        expected = "plain: templates apply to conversations"
        repair = "data.template=plain, or map the columns of the conversations with data.columns"
        raise UserError(Problem("data.template", found, expected, repair))


def _book(settings: DocumentSettings) -> Path | None:
    """Return the source's path if it is a single one-document text file with a held-out fraction."""
    share = isinstance(settings.held_out, float) and settings.held_out > 0
    if not share or settings.separator or not isinstance(settings.source, str):
        return None
    path = local_path(settings.source)
    files = data_files(path, settings.texts) if path else []
    return files[0] if len(files) == 1 and is_text(files[0]) else None


def _cut_book(path: Path, settings: DocumentSettings, encoder: Encoder, seed: int) -> Prepared:
    """Hold out the tail of a text, from the first line after (1 - share) of its characters."""
    [book] = read_source(str(path), texts=settings.texts)
    text: str = book.columns["text"]
    assert isinstance(settings.held_out, float)
    # At a line end, so that neither side begins inside a word.
    cut = text.find("\n", round(len(text) * (1 - settings.held_out))) + 1
    if cut == 0:
        found = f"the last {settings.held_out:.0%} of {path} has no complete line"
        raise UserError(Problem("data.held_out", found, "lines to evaluate on", "raise data.held_out"))
    parts = [
        settings.model_copy(update={"source": [{"text": part}], "held_out": 0})
        for part in (text[:cut], text[cut:])
    ]
    train, end = (prepare(part, encoder, max_length=WHOLE, seed=seed) for part in parts)
    rows, held_out = (TokenizedRows(part.train.arrays, [str(path)]) for part in (train, end))
    return Prepared(rows, held_out, end.prompts, train.report)


def _report(data: Prepared, train: TokenizedRows, held_out: TokenizedRows | None) -> DataReport:
    documents, held = len(data.train), len(data.held_out) if data.held_out else 0
    layout = f"{data.report.layout}; documents: {documents} and {held} held out"
    report = replace(
        data.report,
        layout=layout,
        rows=len(train),
        held_out=len(held_out) if held_out else 0,
        tokens=train.num_tokens,
        trained_tokens=train.num_trained,
        longest=max(train.lengths),
    )
    tell_shares(train, report)
    return report


def _starts(documents: Sequence[Conversation]) -> list[Conversation]:
    """Return passages of documents as prompt and continuation (long ones give several); else all rows."""
    if not any(row.document for row in documents):
        return list(documents)
    passages = []
    # Spread over all documents and, in long ones, over their length.
    for row in documents[:: max(1, len(documents) // STARTS)][:STARTS]:
        text = row.messages[-1].content
        step = max(2 * SHOWN, len(text) * len(documents) // STARTS)
        passages += [
            Conversation(passage, row.where)
            for begin in range(0, len(text), step)
            if (passage := _passage(text[_word(text, begin) : begin + 2 * SHOWN]))
        ]
    return passages


def _word(text: str, begin: int) -> int:
    """Return the start of the first word after ``start``, or ``start`` if the text has no spaces."""
    blank = text.find(" ", begin, begin + SHOWN) if begin else -1
    return begin if blank < 0 else blank + 1


def _passage(text: str) -> list[Message]:
    """Return a text's first half as a prompt and the rest as its reply, [] if it is too short."""
    text = text.strip()
    if len(text) < SHORTEST:
        return []
    blank = text.rfind(" ", 0, len(text) // 2 + 1)
    cut = blank if blank > 0 else len(text) // 2
    return [Message("user", text[:cut]), Message("assistant", text[cut:])]
