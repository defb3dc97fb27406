"""Row counts and token lengths of a recipe's data, measured where possible, otherwise estimated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from align.planning.texts import Said, rows_to_learn, writer
from finetune.data.files import data_files
from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.discovery import PROJECT
from finetune.recipe.paths import local_path
from finetune.recipe.settings import DataSettings, ModelSettings

DATA_SETS = PROJECT / "recipes" / "data_sets.yaml"
BYTES_PER_TOKEN = 4.0
"""English prose under vocabularies of 32,000 to 256,000; code and most other languages have fewer."""
COUNTED = 256
"""Rows that are rendered and counted; they stand for the others."""
LONG = 16
"""Rows with the most characters, among which the one with the most tokens is searched."""
BORDER = 1
"""Special tokens at the beginning of a row, and at the end of a completion."""
LARGE = 24 * 2**20
"""Maximum bytes of local files that are read for a plan, so that it takes a second or two."""


Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Row count and token lengths.

    Attributes:
        rows: to train on; None: unknown.
        prompt: mean tokens of a prompt.
        completion: mean tokens of one completion.
        completions: mean number per row.
        longest: tokens of the longest row with one completion, after truncation.
        longest_prompt: tokens of the longest prompt.
        longest_completion: tokens of the longest completion.
        is_upper_bound: whether the means are upper bounds.
        basis: how the lengths were obtained.
    """

    rows: int | None
    prompt: float
    reply: float
    replies: float
    longest: int
    longest_prompt: int
    longest_reply: int
    bound: bool
    how: str

    @property
    def together(self) -> float:
        """Return the mean tokens of a row whose completions share one prompt."""
        return self.prompt + self.replies * self.reply


def lengths(
    data: DataSettings, model: ModelSettings, *, seed: int, most: int, replies: int, labels: bool
) -> Lengths:
    """Return the lengths of a recipe's rows.

    Args:
        data: its data section.
        model: its base, whose tokenizer counts tokens if it is on this machine.
        seed: of held-out splits and mixtures.
        max_length: maximum tokens of a prompt with one completion.
        completions: per row, where rows cannot be read.
        labels: whether each completion is a row of its own (KTO).

    Raises:
        UserError: mistakes in local data, with file, line and field.
    """
    if (size := _local_bytes(data)) is None:
        return _unread(data, most, replies)
    if size > LARGE:
        return _large(data, size, most, replies)
    rows = rows_to_learn(data, seed, labels=labels)
    write = writer(data.template)
    # Evenly spaced, since files may be sorted.
    some = [write(row) for row in rows[:: max(1, len(rows) // COUNTED)]]
    count, how = _counter(model, some)
    # Memory is planned for the longest row, which a sample would miss.
    long = [write(row) for row in nlargest(LONG, rows, key=lambda row: row.size)]
    return _measured(
        some, long, count, rows=len(rows), most=most, how=f"{len(rows):,} rows of {_names(data)}; {how}"
    )


def _local_bytes(data: DataSettings) -> int | None:
    """Return the bytes of the data's files, 0 for rows given in Python; None if some are on the hub."""
    total = 0
    for source in _sources(data):
        if isinstance(source, list):
            continue
        path = local_path(source)
        if path is None:
            return None
        total += sum(file.stat().st_size for file in data_files(path, data.texts))
    return total


def _sources(data: DataSettings) -> list[Any]:
    return [part.source for part in data.mix] if data.mix is not None else [data.source]


def _names(data: DataSettings) -> str:
    names = [source if isinstance(source, str) else "rows given in Python" for source in _sources(data)]
    return " + ".join(names)


def _measured(
    some: Sequence[Said], long: Sequence[Said], count: Count, *, rows: int, most: int, how: str
) -> Lengths:
    """Return the lengths of all rows from a sample and the longest rows."""
    prompts = [count(row.prompt) + BORDER for row in some]
    replies = [[count(reply) + BORDER for reply in row.replies] for row in some]
    each = [min(most, length) for own in replies for length in own]
    pairs = zip(prompts, replies, strict=True)
    whole = [min(most, prompt + max(own, default=0)) for prompt, own in pairs]
    # Truncation at the maximum length shortens the mean prompt and the mean completion by the same factor.
    mean_prompt, mean_reply = fmean(prompts), fmean(each) if each else 0.0
    kept = min(1.0, fmean(whole) / (mean_prompt + mean_reply))
    ends = [
        min(most, count(row.prompt) + max(map(count, row.replies), default=0) + 2 * BORDER) for row in long
    ]
    return Lengths(
        rows=rows,
        prompt=mean_prompt * kept,
        reply=mean_reply * kept,
        replies=fmean(len(own) for own in replies),
        longest=max(ends),
        longest_prompt=min(most, max(count(row.prompt) + BORDER for row in long)),
        longest_reply=min(most, max(max(map(count, row.replies), default=0) + BORDER for row in long)),
        bound=False,
        how=how,
    )


def _counter(model: ModelSettings, some: Sequence[Said]) -> tuple[Count, str]:
    """Return a token counter, bytes over a sample's bytes per token, and a description of it."""
    file = _tokenizer_file(model)
    if file is None:
        rate = BYTES_PER_TOKEN
        how = f"assuming {rate:g} bytes per token (the base's tokenizer is not on this machine)"
    else:
        # Encoding all rows would take too long for a plan: other rows are converted by bytes per token.
        texts = ["".join((row.prompt, *row.replies)) for row in some]
        tokenizer = Tokenizer.from_file(str(file))
        tokens = sum(len(encoded.ids) for encoded in tokenizer.encode_batch(texts, add_special_tokens=False))
        rate = sum(len(text.encode()) for text in texts) / max(1, tokens)
        how = f"{rate:.2f} bytes per token, counted on {len(some)} of them with the base's tokenizer"
    return lambda text: round(len(text.encode()) / rate), how


def _tokenizer_file(model: ModelSettings) -> Path | None:
    found = resolve_base(model.base)
    if Path(found).is_dir():
        file = Path(found) / "tokenizer.json"
        return file if file.is_file() else None
    cached = try_to_load_from_cache(found, "tokenizer.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None


def _large(data: DataSettings, size: int, most: int, replies: int) -> Lengths:
    """Return lengths from the size of files that are too large to read."""
    rows = _lines(data)
    how = f"{_names(data)}: {size / 2**20:,.0f} MiB, not read for a plan; {BYTES_PER_TOKEN:g} bytes per token"
    if rows is None:
        return Lengths(None, most / 2, most / 2, replies, most, most, most, True, f"{how}, rows not counted")
    # How rows divide into prompt and completion is unknown: half and half.
    mean = min(float(most), size / rows / BYTES_PER_TOKEN)
    return Lengths(rows, mean / 2, mean / 2, replies, most, most, most, False, f"{rows:,} rows; {how}")


def _lines(data: DataSettings) -> int | None:
    """Return the number of rows of JSON Lines files; None for other formats."""
    paths = [local_path(source) for source in _sources(data)]
    files = [file for path in paths if path is not None for file in data_files(path, data.texts)]
    if not all(file.name.endswith(".jsonl") for file in files):
        return None
    return sum(_count_lines(file) for file in files)


def _count_lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def _unread(data: DataSettings, most: int, replies: int) -> Lengths:
    """Return lengths of data on the hub: the row count of our table, rows of maximum length."""
    known = yaml_file.read(DATA_SETS)[0]
    rows = _known_rows(data, known)
    entry = known.get(_name(data.source)) if data.mix is None else None
    mean = entry.get("bytes", 0) / BYTES_PER_TOKEN if entry is not None else 0
    told = f"{rows:,} rows (data set card)" if rows is not None else "row count unknown"
    if mean:
        how = f"{_names(data)}: {told}; mean {mean:.0f} tokens per row, {BYTES_PER_TOKEN:g} bytes per token"
        mean = min(mean, float(most))
        return Lengths(rows, mean / 2, mean / 2, replies, most, most, most, False, how)
    how = f"{_names(data)} is not read: {told}; assuming full rows ({most:,} tokens), an upper bound"
    prompt, reply = (most / 2, most / 2) if replies else (float(most), 0.0)
    return Lengths(rows, prompt, reply, replies, most, most, most, True, how)


def _known_rows(data: DataSettings, known: dict[str, Any]) -> int | None:
    """Return the number of training rows of data sets in the table."""
    if data.mix is None:
        rows = _rows_of(data.source, data.split, known)
        chosen = data.select.rows if data.select is not None and rows is not None else None
    else:
        parts = [part.rows or _rows_of(part.source, part.split or data.split, known) for part in data.mix]
        rows = None if None in parts else sum(part for part in parts if part is not None)
        chosen = data.mix_rows
    if rows is None:
        return chosen
    rows = min(rows, chosen or rows)
    held_out = data.held_out
    return (
        rows
        if isinstance(held_out, str)
        else rows - (held_out if isinstance(held_out, int) else round(held_out * rows))
    )


def _rows_of(source: Any, split: str, known: dict[str, Any]) -> int | None:
    entry = known.get(_name(source))
    return entry["rows"] if entry is not None and entry["split"] == split else None


def _name(source: Any) -> str:
    return source.partition(":")[0] if isinstance(source, str) else ""
