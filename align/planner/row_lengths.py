"""Row counts and token lengths of a recipe's data, measured where possible, otherwise estimated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from align.planner.row_texts import RowText, load_training_rows, row_renderer
from finetune.data.files import source_files
from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.discovery import PROJECT, local_path
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import DataSettings, ModelSettings

DATA_SETS = PROJECT / "recipes" / "data_sets.yaml"
BYTES_PER_TOKEN = 4.0
"""English prose under vocabularies of 32,000 to 256,000; code and most other languages have fewer."""
MAX_SAMPLED_ROWS = 256
"""Rows that are rendered and counted, as a sample of all."""
LONGEST_CANDIDATES = 16
"""Rows with the most characters, among which the one with the most tokens is searched."""
MAX_COUNTED_BYTES = 2 * 2**20
"""Bytes of local files whose rows are all rendered and counted: less than a second."""
MAX_READ_BYTES = 24 * 2**20
"""Maximum bytes of local files that are read for a plan, so that it takes a second or two."""


@dataclass(frozen=True, slots=True)
class RowLengths:
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
        is_exact: whether every row was rendered and its tokens counted.
    """

    rows: int | None
    prompt: float
    completion: float
    completions: float
    longest: int
    longest_prompt: int
    longest_completion: int
    is_upper_bound: bool
    basis: str
    is_exact: bool = False

    @property
    def row_tokens(self) -> float:
        """Return the mean tokens of a row whose completions share one prompt."""
        return self.prompt + self.completions * self.completion

    def truncated(self, max_length: int) -> "RowLengths":
        """Return the lengths of rows truncated to a maximum length."""
        # One factor for both: only means are known, not how each row divides into prompt and completion.
        retained_fraction = min(1.0, max_length / max(1.0, self.prompt + self.completion))
        return replace(
            self,
            prompt=self.prompt * retained_fraction,
            completion=self.completion * retained_fraction,
            longest=min(max_length, self.longest),
            longest_prompt=min(max_length, self.longest_prompt),
            longest_completion=min(max_length, self.longest_completion),
        )

    def as_blocks(self, max_length: int) -> "RowLengths":
        """Return documents as the blocks they are concatenated and split into: full rows without a prompt."""
        rows = None if self.rows is None else max(1, ceil(self.rows * self.row_tokens / max_length))
        return replace(
            self,
            rows=rows,
            prompt=0.0,
            completion=float(max_length),
            completions=1.0,
            longest=max_length,
            longest_completion=max_length,
            is_upper_bound=False,
        )


def measure_lengths(
    data: DataSettings, model: ModelSettings, *, seed: int, max_length: int, completions: int, labels: bool
) -> RowLengths:
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
        return _lengths_by_table(data, max_length, completions)
    if size > MAX_READ_BYTES:
        return _lengths_by_file_size(data, size, max_length, completions)
    rows = load_training_rows(data, seed, labels=labels)
    tokenizer_file = _tokenizer_file(model)
    render = row_renderer(data, None if tokenizer_file is None else tokenizer_file.parent)
    is_exact = size <= MAX_COUNTED_BYTES and tokenizer_file is not None
    # Evenly spaced, since files may be sorted.
    step = 1 if is_exact else max(1, len(rows) // MAX_SAMPLED_ROWS)
    sample = [render(row) for row in rows[::step]]
    # Memory is planned for the longest row, which a sample would miss.
    longest_rows = [render(row) for row in nlargest(LONGEST_CANDIDATES, rows, key=lambda row: row.size)]
    counts, basis = _count_tokens(tokenizer_file, [*sample, *longest_rows], len(sample))
    kept = [row for row in counts if data.overflow == "truncate" or row.longest <= max_length]
    if not kept:
        actual = f"drop, and no row has at most {max_length} tokens"
        raise UserError(Problem("data.overflow", actual, "rows to train on", "data.overflow=truncate"))
    num_dropped = sum(row.longest > max_length for row in counts[: len(sample)]) * (len(kept) < len(counts))
    num_rows = len(rows) - round(num_dropped * len(rows) / len(sample))
    sampled = [row for row in counts[: len(sample)] if row in kept]
    dropped = f", {len(rows) - num_rows:,} longer than {max_length} tokens dropped" if num_dropped else ""
    return _lengths_of_sample(
        sampled or kept,
        kept,
        rows=num_rows,
        max_length=max_length,
        is_exact=is_exact,
        basis=f"{num_rows:,} rows of {_source_names(data)}{dropped}; {basis}",
    )


@dataclass(frozen=True, slots=True)
class RowTokens:
    """The tokens of a row's prompt and of each completion."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longest completion."""
        return self.prompt + max(self.completions, default=0)


def _local_bytes(data: DataSettings) -> int | None:
    """Return the bytes of the data's files and of rows given in Python; None if some are on the Hub."""
    total = 0
    for source in _sources(data):
        if isinstance(source, PythonRows):
            total += source.num_bytes
            continue
        path = local_path(source)
        if path is None:
            return None
        total += sum(file.stat().st_size for file in source_files(path, data.text_format, data.split))
    return total


def _sources(data: DataSettings) -> list[Any]:
    return [component.source for component in data.mix] if data.mix is not None else [data.source]


def _source_names(data: DataSettings) -> str:
    names = [source if isinstance(source, str) else "rows given in Python" for source in _sources(data)]
    return " + ".join(names)


def _lengths_of_sample(
    sample: Sequence[RowTokens],
    rows_counted: Sequence[RowTokens],
    *,
    rows: int,
    max_length: int,
    is_exact: bool,
    basis: str,
) -> RowLengths:
    """Return the lengths of all rows from a sample, and the longest ones of all that were counted."""
    # Truncated as in a run: completions of preferences lose their end, prompts their beginning.
    truncated = [
        (min(max_length, row.longest), [min(max_length, tokens) for tokens in row.completions], row.prompt)
        for row in sample
    ]
    prompt_tokens = [total - max(completions, default=0) for total, completions, _ in truncated]
    completion_tokens = [tokens for _, completions, _ in truncated for tokens in completions]
    longest = max(min(max_length, row.longest) for row in rows_counted)
    return RowLengths(
        rows=rows,
        prompt=fmean(prompt_tokens),
        completion=fmean(completion_tokens) if completion_tokens else 0.0,
        completions=fmean(len(row.completions) for row in sample),
        longest=longest,
        longest_prompt=min(max_length, max(row.prompt for row in rows_counted)),
        longest_completion=min(max_length, max(max(row.completions, default=0) for row in rows_counted)),
        is_upper_bound=False,
        basis=basis,
        is_exact=is_exact,
    )


def _count_tokens(
    tokenizer_file: Path | None, rows: Sequence[RowText], num_sampled: int
) -> tuple[list[RowTokens], str]:
    """Return the tokens of rows, and how they were counted.

    Args:
        tokenizer_file: of the base; None: four bytes are a token.
        rows: the rows; the first ``num_sampled`` are the sample.
        num_sampled: for the description.
    """
    texts = [text for row in rows for text in (row.prompt, row.after, *row.completions)]
    if tokenizer_file is None:
        counts = [round(len(text.encode()) / BYTES_PER_TOKEN) for text in texts]
        has_bos = True
        basis = f"assuming {BYTES_PER_TOKEN:g} bytes per token (the base's tokenizer is not on this machine)"
    else:
        # The tokenizers package alone: a plan does not import torch.
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        counts = [len(encoded.ids) for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
        has_bos = len(tokenizer.encode("a").ids) > len(tokenizer.encode("a", add_special_tokens=False).ids)
        basis = f"counted on {num_sampled} of them with the base's tokenizer"
    remaining = iter(counts)
    counted = []
    for row in rows:
        prompt = next(remaining) + next(remaining) + (row.bos and has_bos) + row.other_ends
        # The end of each completion; of a conversation's replies, all of them.
        completions = tuple(next(remaining) + row.ends for _ in row.completions)
        counted.append(RowTokens(prompt, completions))
    return counted, basis


def _tokenizer_file(model: ModelSettings) -> Path | None:
    base_id = resolve_base(model.base)
    if Path(base_id).is_dir():
        file = Path(base_id) / "tokenizer.json"
        return file if file.is_file() else None
    cached = try_to_load_from_cache(base_id, "tokenizer.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None


def _lengths_by_file_size(data: DataSettings, size: int, max_length: int, completions: int) -> RowLengths:
    """Return lengths from the size of files that are too large to read."""
    rows = _count_rows(data)
    size_text = f"{size / 2**20:,.0f} MiB"
    basis = f"{_source_names(data)}: {size_text}, not read for a plan; {BYTES_PER_TOKEN:g} bytes per token"
    if rows is None:
        return RowLengths(
            None,
            max_length / 2,
            max_length / 2,
            completions,
            max_length,
            max_length,
            max_length,
            True,
            f"{basis}, rows not counted",
        )
    # How rows divide into prompt and completion is unknown: half and half.
    mean = min(float(max_length), size / rows / BYTES_PER_TOKEN)
    return RowLengths(
        rows,
        mean / 2,
        mean / 2,
        completions,
        max_length,
        max_length,
        max_length,
        False,
        f"{rows:,} rows; {basis}",
    )


def _count_rows(data: DataSettings) -> int | None:
    """Return the number of rows of JSON Lines files and of rows given in Python; None for other formats."""
    in_python = [source.num_rows for source in _sources(data) if isinstance(source, PythonRows)]
    paths = [local_path(source) for source in _sources(data) if isinstance(source, str)]
    files = [
        file
        for path in paths
        if path is not None
        for file in source_files(path, data.text_format, data.split)
    ]
    if not all(file.name.endswith(".jsonl") for file in files):
        return None
    return sum(in_python) + sum(_count_lines(file) for file in files)


def _count_lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def _lengths_by_table(data: DataSettings, max_length: int, completions: int) -> RowLengths:
    """Return lengths of data on the hub: the row count of our table, rows of maximum length."""
    table = yaml_file.read_yaml(DATA_SETS)[0]
    rows = _known_rows(data, table)
    entry = table.get(_data_set_name(data.source)) if data.mix is None else None
    mean = entry.get("bytes", 0) / BYTES_PER_TOKEN if entry is not None else 0
    row_count = f"{rows:,} rows (dataset card)" if rows is not None else "row count unknown"
    if mean:
        mean_text = f"mean {mean:.0f} tokens per row, {BYTES_PER_TOKEN:g} bytes per token"
        basis = f"{_source_names(data)}: {row_count}; {mean_text}"
        mean = min(mean, float(max_length))
        return RowLengths(
            rows, mean / 2, mean / 2, completions, max_length, max_length, max_length, False, basis
        )
    assumed = f"assuming full rows ({max_length:,} tokens), an upper bound"
    basis = f"{_source_names(data)} is not read: {row_count}; {assumed}"
    prompt, completion = (max_length / 2, max_length / 2) if completions else (float(max_length), 0.0)
    return RowLengths(rows, prompt, completion, completions, max_length, max_length, max_length, True, basis)


def _known_rows(data: DataSettings, table: dict[str, Any]) -> int | None:
    """Return the number of training rows of datasets in the table."""
    if data.mix is None:
        rows = _table_rows(data.source, data.split, table)
        limit = data.select.rows if data.select is not None and rows is not None else None
    else:
        component_rows = [
            # A source's cap is taken as its number of rows.
            component.rows or _table_rows(component.source, component.split or data.split, table)
            for component in data.mix
        ]
        rows = (
            None
            if None in component_rows
            else sum(component for component in component_rows if component is not None)
        )
        limit = data.epoch_rows
    if rows is None:
        return limit
    rows = min(rows, limit or rows)
    held_out = data.held_out
    return (
        rows
        if isinstance(held_out, str | PythonRows)
        else rows - (held_out if isinstance(held_out, int) else round(held_out * rows))
    )


def _table_rows(source: Any, split: str, table: dict[str, Any]) -> int | None:
    entry = table.get(_data_set_name(source))
    return entry["rows"] if entry is not None and entry["split"] == split else None


def _data_set_name(source: Any) -> str:
    return source.partition(":")[0] if isinstance(source, str) else ""
