"""How many rows there are to learn, and how long they are: counted where possible, else said why not."""

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
"""English prose under tokenizers of 32,000 to 256,000 words; code and most other languages have fewer."""
COUNTED = 256
"""Rows that are written down and counted; the others are taken to be like them."""
LONG = 16
"""Rows with the most characters, among which the longest is sought."""
BORDER = 1
"""Special tokens at the beginning of a row, and at the end of a reply."""
LARGE = 24 * 2**20
"""Bytes of local files that are read for a plan, so that it answers in a second or two."""


Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Rows and their tokens.

    Attributes:
        rows: to learn; None: not known here.
        prompt: tokens of a prompt, on average.
        reply: tokens of one reply, on average.
        replies: of a row, on average.
        longest: tokens of the longest row with one reply, after the cut.
        longest_prompt: tokens of the longest prompt.
        longest_reply: tokens of the longest reply.
        bound: whether the tokens are an upper bound and no average.
        how: where this comes from.
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
        """Return the tokens of a row on average whose replies stand behind one prompt."""
        return self.prompt + self.replies * self.reply


def lengths(
    data: DataSettings, model: ModelSettings, *, seed: int, most: int, replies: int, labels: bool
) -> Lengths:
    """Return how long the rows of a recipe are.

    Args:
        data: its data section.
        model: its base, whose tokenizer counts where it is on this machine.
        seed: draws held-out rows and mixtures.
        most: tokens of a prompt with one reply at most.
        replies: of a row, where rows cannot be read.
        labels: whether each reply is a row of its own.

    Raises:
        UserError: mistakes in local data, with file, line and field.
    """
    if (size := _local_bytes(data)) is None:
        return _unread(data, most, replies)
    if size > LARGE:
        return _large(data, size, most, replies)
    rows = rows_to_learn(data, seed, labels=labels)
    write = writer(data.template)
    some = [write(row) for row in rows[:: max(1, len(rows) // COUNTED)]]
    count, how = _counter(model, some)
    long = [write(row) for row in nlargest(LONG, rows, key=lambda row: row.size)]
    return _measured(
        some, long, count, rows=len(rows), most=most, how=f"{len(rows):,} rows of {_names(data)}; {how}"
    )


def _local_bytes(data: DataSettings) -> int | None:
    """Return the bytes of the data's files, 0 for rows given in Python; None where some is on the hub."""
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
    """Return the lengths of all rows by some of them and by the longest."""
    prompts = [count(row.prompt) + BORDER for row in some]
    replies = [[count(reply) + BORDER for reply in row.replies] for row in some]
    each = [min(most, length) for own in replies for length in own]
    pairs = zip(prompts, replies, strict=True)
    whole = [min(most, prompt + max(own, default=0)) for prompt, own in pairs]
    # Rows are cut at `most`: what the average row loses is taken off its prompt and its reply alike.
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
    """Return what counts a text's tokens, and how: by the rate of some rows under the base's tokenizer."""
    file = _tokenizer_file(model)
    if file is None:
        rate = BYTES_PER_TOKEN
        how = f"{rate:g} bytes a token assumed, the base's tokenizer is not on this machine"
    else:
        texts = ["".join((row.prompt, *row.replies)) for row in some]
        tokenizer = Tokenizer.from_file(str(file))
        tokens = sum(len(encoded.ids) for encoded in tokenizer.encode_batch(texts, add_special_tokens=False))
        rate = sum(len(text.encode()) for text in texts) / max(1, tokens)
        how = f"{rate:.2f} bytes a token, counted on {len(some)} of them with the base's tokenizer"
    return lambda text: round(len(text.encode()) / rate), how


def _tokenizer_file(model: ModelSettings) -> Path | None:
    found = resolve_base(model.base)
    if Path(found).is_dir():
        file = Path(found) / "tokenizer.json"
        return file if file.is_file() else None
    cached = try_to_load_from_cache(found, "tokenizer.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None


def _large(data: DataSettings, size: int, most: int, replies: int) -> Lengths:
    """Return what the size of files tells that are too large to be read for a plan."""
    rows = _lines(data)
    how = (
        f"{_names(data)} has {size / 2**20:,.0f} MiB, not read for a plan: {BYTES_PER_TOKEN:g} bytes a token"
    )
    if rows is None:
        return Lengths(None, most / 2, most / 2, replies, most, most, most, True, f"{how}, rows not counted")
    mean = min(float(most), size / rows / BYTES_PER_TOKEN)
    return Lengths(rows, mean / 2, mean / 2, replies, most, most, most, False, f"{rows:,} lines; {how}")


def _lines(data: DataSettings) -> int | None:
    """Return the lines of files that hold a row a line; None for others."""
    paths = [local_path(source) for source in _sources(data)]
    files = [file for path in paths if path is not None for file in data_files(path, data.texts)]
    if not all(file.name.endswith(".jsonl") for file in files):
        return None
    return sum(_count_lines(file) for file in files)


def _count_lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def _unread(data: DataSettings, most: int, replies: int) -> Lengths:
    """Return what is known of data on the hub: rows by the table, each as long as a row may be."""
    known = yaml_file.read(DATA_SETS)[0]
    rows = _known_rows(data, known)
    entry = known.get(_name(data.source)) if data.mix is None else None
    mean = entry.get("bytes", 0) / BYTES_PER_TOKEN if entry is not None else 0
    told = f"{rows:,} rows (the hub's card)" if rows is not None else "how many rows it has is not known here"
    if mean:
        how = (
            f"{_names(data)}: {told}; {mean:.0f} tokens each on average, at {BYTES_PER_TOKEN:g} bytes a token"
        )
        mean = min(mean, float(most))
        return Lengths(rows, mean / 2, mean / 2, replies, most, most, most, False, how)
    how = (
        f"{_names(data)} is not read: {told}; every row is taken to be full ({most:,} tokens), an upper bound"
    )
    prompt, reply = (most / 2, most / 2) if replies else (float(most), 0.0)
    return Lengths(rows, prompt, reply, replies, most, most, most, True, how)


def _known_rows(data: DataSettings, known: dict[str, Any]) -> int | None:
    """Return the rows to learn of data sets in the table, less those held out."""
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
