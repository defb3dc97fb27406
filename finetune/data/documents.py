"""Documents for continued pretraining: concatenated and chunked, or packed; every token is trained on.

``packing: false``: all documents concatenated, each with the BOS and EOS of the tokenizer, and chunked into
blocks of ``max_length``; attention is not masked between documents, EOS separates them (GPT-3: Brown et al.
2020, arXiv 2005.14165, appendix B). ``packing: true``: complete documents (longer ones in pieces) share a row
of at most ``max_length``; position ids restart at each, and attention is masked between them. The first token
of a block, or of a piece, has no prefix to be predicted from and carries no loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from data_templates.segments import Message
from finetune.data.collate import pack
from finetune.data.conversation import Conversation
from finetune.data.dataset import PreparedData, TokenizedRows, prepare_conversations, record_source_shares
from finetune.data.files import data_files, is_text_file
from finetune.data.layouts import DOCUMENT
from finetune.data.report import DataReport
from finetune.data.sources import read_source
from finetune.data.tokens import Encoder
from finetune.recipe.discovery import local_path
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import DataSettings, DocumentSettings

PACKING_WINDOW = 512
"""Pieces per packing window: neighbors stay near each other, and the time is linear in the data."""

Piece = tuple[int, int]
"""Start and end of a piece of a document in the flat array of all tokens."""

NO_LIMIT = 2**31 - 1
"""No limit: documents are tokenized without truncation, then chunked or packed."""

PROMPT_CHARACTERS = 200
"""Characters of a sample prompt (the start of a passage), and of the reference continuation."""

MIN_PASSAGE_CHARACTERS = 16
"""Minimum number of characters of a passage."""

NUM_PASSAGES = 64
"""Number of held-out passages used as sample prompts."""


def prepare_data(settings: DataSettings, encoder: Encoder, *, max_length: int, seed: int) -> PreparedData:
    """Prepare a data section: documents for continued pretraining, conversations otherwise.

    Raises:
        UserError: a source cannot be read, or no trainable row remains.
    """
    if isinstance(settings, DocumentSettings):
        return prepare_documents(settings, encoder, max_length=max_length, seed=seed)
    return prepare_conversations(settings, encoder, max_length=max_length, seed=seed)


def prepare_documents(
    settings: DocumentSettings, encoder: Encoder, *, max_length: int, seed: int
) -> PreparedData:
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
    text_file = _single_text_file(settings)
    data = (
        _hold_out_tail(text_file, settings, encoder, seed)
        if text_file is not None
        else prepare_conversations(settings, encoder, max_length=NO_LIMIT, seed=seed)
    )
    _require_plain_template(settings, data.report)
    train = documents_to_rows(data.train, max_length, packing=settings.packing)
    held_out = None
    if data.held_out is not None:
        held_out = documents_to_rows(data.held_out, max_length, packing=settings.packing)
    report = _documents_report(data, train, held_out)
    # A template would render the start of a plain text as a user turn.
    prompts = [row for row in data.prompts if settings.template == "plain" or not row.is_document]
    return PreparedData(train, held_out, _passages(prompts), report)


def documents_to_rows(documents: TokenizedRows, size: int, *, packing: bool) -> TokenizedRows:
    """Return rows of at most ``size`` tokens: chunks of the token stream, or packed documents."""
    ids = documents.arrays["input_ids"]
    if packing:
        return _pack_rows(documents, pack_documents(documents.lengths, size))
    offsets = np.asarray(block_offsets(len(ids), size), dtype=np.int64)
    loss_mask = np.ones(offsets[-1], dtype=bool)
    # The first token of each block: its prefix, if any, is in the block before.
    loss_mask[offsets[:-1]] = False
    arrays = {"input_ids": ids[: offsets[-1]], "loss_mask": loss_mask, "offsets": offsets}
    return _with_locations(arrays, documents, offsets[:-1])


def _pack_rows(documents: TokenizedRows, rows: list[list[tuple[int, int]]]) -> TokenizedRows:
    pieces = [piece for row in rows for piece in row]
    lengths = [end - start for start, end in pieces]
    document_offsets = np.asarray(list(accumulate(lengths, initial=0)), dtype=np.int64)
    row_starts = np.asarray(list(accumulate((len(row) for row in rows), initial=0)))
    ids = np.concatenate([documents.arrays["input_ids"][start:end] for start, end in pieces])
    loss_mask = np.ones(len(ids), dtype=bool)
    # The first token of each piece has no prefix: attention is masked towards the piece before it.
    loss_mask[document_offsets[:-1]] = False
    arrays = {
        "input_ids": ids,
        "loss_mask": loss_mask,
        "offsets": document_offsets[row_starts],
        "document_offsets": document_offsets[:-1],
    }
    return _with_locations(arrays, documents, [row[0][0] for row in rows])


def _with_locations(
    arrays: dict[str, np.ndarray], documents: TokenizedRows, starts: Sequence[int] | np.ndarray
) -> TokenizedRows:
    """Return rows with the location and source of the document in which each begins."""
    # side="right": a row that begins exactly at a document's offset belongs to that document.
    document_ids = np.searchsorted(documents.arrays["offsets"], starts, side="right") - 1
    locations = [documents.locations[index] for index in document_ids]
    return TokenizedRows(arrays, locations, [documents.source_ids[index] for index in document_ids])


def _require_plain_template(settings: DocumentSettings, report: DataReport) -> None:
    if settings.template != "plain" and all(source.layout == DOCUMENT.name for source in report.sources):
        actual = f"'{settings.template}', but the data is plain text"
        expected = "plain: templates apply to conversations"
        repair = "data.template=plain, or map the columns of the conversations with data.columns"
        raise UserError(Problem("data.template", actual, expected, repair))


def _single_text_file(settings: DocumentSettings) -> Path | None:
    """Return the source's path if it is a single one-document text file with a held-out fraction."""
    share = isinstance(settings.held_out, float) and settings.held_out > 0
    if not share or settings.separator or not isinstance(settings.source, str):
        return None
    path = local_path(settings.source)
    files = data_files(path, settings.text_format) if path else []
    return files[0] if len(files) == 1 and is_text_file(files[0]) else None


def _hold_out_tail(path: Path, settings: DocumentSettings, encoder: Encoder, seed: int) -> PreparedData:
    """Hold out the tail of a text, from the first line after (1 - share) of its characters."""
    [row] = read_source(str(path), text_format=settings.text_format)
    text: str = row.columns["text"]
    assert isinstance(settings.held_out, float)
    # At a line end, so that neither side begins inside a word.
    split_at = text.find("\n", round(len(text) * (1 - settings.held_out))) + 1
    if split_at == 0:
        actual = f"the last {settings.held_out:.0%} of {path} has no complete line"
        raise UserError(Problem("data.held_out", actual, "lines to evaluate on", "raise data.held_out"))
    halves = [
        settings.model_copy(update={"source": PythonRows.of([{"text": half}]), "held_out": 0})
        for half in (text[:split_at], text[split_at:])
    ]
    train, tail = (prepare_conversations(half, encoder, max_length=NO_LIMIT, seed=seed) for half in halves)
    # The halves were passed as rows given in Python, which have no file as their location.
    rows, held_out = (TokenizedRows(half.train.arrays, [str(path)]) for half in (train, tail))
    return PreparedData(rows, held_out, tail.prompts, train.report)


def _documents_report(data: PreparedData, train: TokenizedRows, held_out: TokenizedRows | None) -> DataReport:
    num_documents, num_held_out = len(data.train), len(data.held_out) if data.held_out else 0
    layout = f"{data.report.layout}; documents: {num_documents} and {num_held_out} held out"
    report = replace(
        data.report,
        layout=layout,
        rows=len(train),
        held_out=len(held_out) if held_out else 0,
        tokens=train.num_tokens,
        trained_tokens=train.num_trained,
        longest=max(train.lengths),
    )
    record_source_shares(train, report)
    return report


def _passages(documents: Sequence[Conversation]) -> list[Conversation]:
    """Return passages of documents as prompt and continuation (long ones give several); else all rows."""
    if not any(row.is_document for row in documents):
        return list(documents)
    passages = []
    # Spread over all documents and, in long ones, over their length.
    for row in documents[:: max(1, len(documents) // NUM_PASSAGES)][:NUM_PASSAGES]:
        text = row.messages[-1].content
        step = max(2 * PROMPT_CHARACTERS, len(text) * len(documents) // NUM_PASSAGES)
        passages += [
            Conversation(passage, row.location)
            for start in range(0, len(text), step)
            if (passage := _split_passage(text[_next_word(text, start) : start + 2 * PROMPT_CHARACTERS]))
        ]
    return passages


def _next_word(text: str, start: int) -> int:
    """Return the start of the first word after ``start``, or ``start`` if the text has no spaces."""
    space = text.find(" ", start, start + PROMPT_CHARACTERS) if start else -1
    return start if space < 0 else space + 1


def _split_passage(text: str) -> list[Message]:
    """Return a text's first half as a prompt and the rest as its reply, [] if it is too short."""
    text = text.strip()
    if len(text) < MIN_PASSAGE_CHARACTERS:
        return []
    # At a space where there is one, so that the prompt does not end inside a word.
    space = text.rfind(" ", 0, len(text) // 2 + 1)
    split_at = space if space > 0 else len(text) // 2
    return [Message("user", text[:split_at]), Message("assistant", text[split_at:])]


def block_offsets(total: int, size: int) -> list[int]:
    """Return the offsets of blocks of ``size`` tokens, and the end of the last one, which may be shorter.

    A remainder of one token is dropped: it has no prefix to be predicted from.

    >>> block_offsets(10, 4), block_offsets(9, 4)
    ([0, 4, 8, 10], [0, 4, 8])
    """
    offsets = [*range(0, total, size), total]
    return offsets[:-1] if len(offsets) > 2 and offsets[-1] - offsets[-2] == 1 else offsets


def pack_documents(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """Return the pieces of each row: documents of at most ``size`` tokens are not split, longer ones are.

    Rows are filled by first-fit decreasing over 512 pieces at a time (Ding et al. 2024, arXiv 2404.10830:
    complete documents in place of truncated ones). A remainder of one token is dropped.

    >>> pack_documents([3, 6, 2], 5)
    [[(3, 8)], [(0, 3), (9, 11)]]
    """
    spans = pairwise(accumulate(lengths, initial=0))
    pieces = [piece for start, end in spans for piece in _split_document(start, end, size)]
    rows = []
    for first in range(0, len(pieces), PACKING_WINDOW):
        window = pieces[first : first + PACKING_WINDOW]
        bins = pack([end - start for start, end in window], size)
        # Pieces in data order within a row, not in the order in which first-fit decreasing placed them.
        rows += [[window[index] for index in sorted(items)] for items in bins]
    return rows


def _split_document(start: int, end: int, size: int) -> list[Piece]:
    spans = [(offset, min(offset + size, end)) for offset in range(start, end, size)]
    return [(begin, stop) for begin, stop in spans if stop - begin > 1]
