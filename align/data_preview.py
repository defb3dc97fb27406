"""Data preview: a recipe's tokenized rows with their loss mask, length statistics and step count.

The terminal, the JSON output and the HTML page show the same data. Loads the tokenizer and config, not the
weights.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

import finetune.training
from align.preference.rows.completion_rows import as_rows
from align.preference.rows.prepare import Kind, prepare_preferences
from align.preference.settings import PreferenceSettings
from align.rl.prompts import Prompts, longest_prompt, prepare_prompts
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.data.dataset import TokenizedRows
from finetune.data.documents import prepare_any
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.planning.choices import optimizer_steps
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import TrainSettings
from finetune.training.text import Text, text_of

BARS = 12
"""Maximum bars of the histogram."""

NICE = (1, 2, 4, 5, 8)
"""Bar widths are one of these times a power of ten, for readable bin edges."""

KINDS: dict[str, Kind] = {"dpo": "rankings", "reward": "rankings", "kto": "labels"}
"""Kind of preference data that each stage reads."""

Facts = dict[str, Any]


def preview(recipe: Recipe, *, rows: int) -> Facts:
    """Prepare a recipe's data and return the preview as plain data.

    Args:
        recipe: the loaded recipe.
        rows: number of rows to show.

    Raises:
        UserError: invalid data (with file, line and field), or unknown base.
    """
    settings, train = recipe.settings, recipe.settings.train
    text, reason = text_of(settings)
    length, reason = _longest(recipe, text, reason)
    report, learnt, items = _prepared(recipe, text, length)
    return {
        "stage": recipe.stage,
        "recipe": recipe.name,
        "description": recipe.description,
        "base": settings.model.base,
        "template": settings.data.template,
        "max_length": length,
        "max_length_reason": reason,
        **{key: value for key, value in asdict(report).items() if key not in ("counts", "examples")},
        "trained_share": report.trained_tokens / report.tokens,
        "counts": [
            {"what": what, "rows": number, "first": report.examples[what]}
            for what, number in report.counts.items()
        ],
        "lengths": _lengths(learnt.lengths),
        **_work(report, len(items.sources), train),
        "shown": [
            _row(learnt, index, text.encoder)
            for item in _chosen(items.sources, rows)
            for index in range(*items.rows[item : item + 2])
        ],
    }


def _work(report: DataReport, count: int, train: TrainSettings) -> Facts:
    """Return epochs, steps and token budget for N items; None for prompts, whose stages count otherwise."""
    if report.prompts:
        return {key: None for key in ("epochs", "steps", "token_budget", "trained_token_budget")} | {
            "batch_size": train.batch_size
        }
    steps = optimizer_steps(
        count, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )
    seen = train.max_steps * train.batch_size if train.max_steps else count * train.epochs
    return {
        "epochs": seen / count,
        "batch_size": train.batch_size,
        "steps": steps,
        "token_budget": round(report.tokens / count * seen),
        "trained_token_budget": round(report.trained_tokens / count * seen),
    }


@dataclass(frozen=True, slots=True)
class Items:
    """The items of a batch: source and first row of each; a comparison has one row per completion."""

    sources: Sequence[int]
    rows: Sequence[int]


def _longest(recipe: Recipe, text: Text, reason: str) -> tuple[int, str]:
    """Return the maximum tokens per row and the reason; for prompts, what the completions leave."""
    settings = recipe.settings.data
    if not isinstance(settings, PromptSettings):
        return text.max_length, reason
    sampling = dict(recipe.settings)["sampling"]
    assert isinstance(sampling, SamplingSettings), "stages on prompts have sampling settings"
    return longest_prompt(settings, text, room=sampling.max_new_tokens)


def _prepared(recipe: Recipe, text: Text, length: int) -> tuple[DataReport, TokenizedRows, Items]:
    """Return report, tokenized rows and items of conversations, texts, prompts or comparisons.

    Raises:
        UserError: invalid data, or a stage that converts its preferences to other rows.
    """
    settings, encoder = recipe.settings.data, text.encoder
    seed = recipe.settings.train.seed
    if isinstance(settings, PromptSettings):
        asked = prepare_prompts(settings, encoder, max_prompt_length=length, seed=seed)
        sources = [prompt.source for prompt in asked.train]
        return asked.report, _as_rows(asked.train), Items(sources, range(len(asked.train) + 1))
    if not isinstance(settings, PreferenceSettings):
        prepared = prepare_any(settings, encoder, max_length=length, seed=seed)
        return prepared.report, prepared.train, Items(prepared.train.sources, range(len(prepared.train) + 1))
    if recipe.stage not in KINDS:
        found = f"'{recipe.stage}' converts its preferences to conversations at run time"
        repair = "`llm-align data --stage dpo` shows the preferences"
        raise UserError(Problem("--stage", found, f"another stage, or one of {', '.join(KINDS)}", repair))
    data = prepare_preferences(settings, encoder, max_length=length, seed=seed, kind=KINDS[recipe.stage])
    firsts = np.cumsum([0, *data.train.completions]).tolist()
    return data.report, as_rows(data.train), Items(data.train.sources, firsts)


def _as_rows(prompts: Prompts) -> TokenizedRows:
    """Return prompts as rows whose loss mask is all False."""
    ids = np.concatenate([np.asarray(prompt.ids, dtype=np.int32) for prompt in prompts])
    starts = np.concatenate([[0], np.cumsum(prompts.lengths)]).astype(np.int64)
    arrays = {"input_ids": ids, "trained": np.zeros(len(ids), dtype=bool), "starts": starts}
    return TokenizedRows(arrays, prompts.places, [prompt.source for prompt in prompts])


def write_page(facts: Facts, path: Path) -> None:
    """Write the preview as a self-contained HTML page.

    Raises:
        UserError: the file cannot be written.
    """
    folders = [Path(__file__).parent, Path(finetune.training.__path__[0])]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True)
    try:
        path.write_text(environment.get_template("data.html.j2").render(facts), encoding="utf-8")
    except OSError as error:
        found = f"cannot be written: {error.strerror}"
        raise UserError(Problem(f"--html {path}", found, "a file in an existing folder")) from error


def _chosen(sources: Sequence[int], count: int) -> list[int]:
    """Return evenly spaced rows to show, alternating between sources."""
    own = [np.flatnonzero(np.asarray(sources) == number) for number in sorted(set(sources))]
    each = -(-count // len(own))
    shown = [rows[np.linspace(0, len(rows) - 1, min(each, len(rows)), dtype=int)] for rows in own]
    turns = chain.from_iterable(zip_longest(*shown))
    return [int(index) for index in turns if index is not None][:count]


def _row(rows: TokenizedRows, index: int, encoder: Encoder) -> Facts:
    """Return a row as text spans with their loss mask; a truncated span may end within a character."""
    start, end = rows.arrays["starts"][index : index + 2]
    ids, trained = (rows.arrays[name][start:end].tolist() for name in ("input_ids", "trained"))
    pieces, read = [], 0
    for learnt, group in groupby(trained):
        before, read = read, read + len(list(group))
        pieces.append({"text": _text_between(ids, before, read, encoder), "trained": learnt})
    return {
        "where": rows.places[index],
        "source": rows.sources[index],
        "tokens": len(ids),
        "trained_tokens": sum(trained),
        "pieces": pieces,
    }


def _text_between(ids: list[int], start: int, end: int, encoder: Encoder) -> str:
    """Return the text of tokens start to end."""
    # Decoded after the tokens before them: alone, many tokenizers drop the leading space.
    before, whole = (
        str(encoder.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)) for stop in (start, end)
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return str(encoder.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))


def _lengths(lengths: Sequence[int]) -> Facts:
    """Return statistics of the row lengths in tokens, with a histogram of at most MAX_BARS bars."""
    longest = max(lengths)
    width = _bar_width(longest)
    counts = np.bincount((np.asarray(lengths) - 1) // width)
    bars = [
        {"from": number * width + 1, "to": min((number + 1) * width, longest), "rows": int(counts[number])}
        for number in range(int(np.flatnonzero(counts)[0]), len(counts))
    ]
    return {
        "mean": float(np.mean(lengths)),
        "median": float(np.median(lengths)),
        "percentile_95": float(np.percentile(lengths, 95)),
        "histogram": bars,
    }


def _bar_width(longest: int) -> int:
    power = 1
    while NICE[-1] * power * BARS < longest:
        power *= 10
    return next(nice * power for nice in NICE if nice * power * BARS >= longest)
