"""What a recipe's data comes to before anything is trained: rows as the model sees them, lengths, steps.

Plain facts first; the terminal, JSON and the HTML page show the same ones. Tokenizer and config are read, the
model's weights are not.
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
"""Bars of the histogram at most."""

NICE = (1, 2, 4, 5, 8)
"""A bar is as wide as one of these times a power of ten: borders that can be read."""

KINDS: dict[str, Kind] = {"dpo": "rankings", "reward": "rankings", "kto": "labels"}
"""What the stages that learn from preferences read."""

Facts = dict[str, Any]


def preview(recipe: Recipe, *, rows: int) -> Facts:
    """Return what a recipe's data comes to, as plain data.

    Args:
        recipe: what would be run.
        rows: how many rows are shown as the model sees them.

    Raises:
        UserError: mistakes in the data, with file, line and field; or no such base.
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
    """Return what a run of so many items would take; of prompts that is the stage's own affair: nothing."""
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
    """What a step counts: each item's source, and where its rows begin; comparisons have one a completion."""

    sources: Sequence[int]
    rows: Sequence[int]


def _longest(recipe: Recipe, text: Text, reason: str) -> tuple[int, str]:
    """Return the tokens of a row at most and why: of a prompt, what the replies leave."""
    settings = recipe.settings.data
    if not isinstance(settings, PromptSettings):
        return text.max_length, reason
    sampling = dict(recipe.settings)["sampling"]
    assert isinstance(sampling, SamplingSettings), "stages that ask prompts say how replies are drawn"
    return longest_prompt(settings, text, room=sampling.max_new_tokens)


def _prepared(recipe: Recipe, text: Text, length: int) -> tuple[DataReport, TokenizedRows, Items]:
    """Return what became of the data: rows of conversations and texts, of prompts, or of comparisons.

    Raises:
        UserError: mistakes in the data, or a stage that makes other rows of its preferences.
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
        found = f"'{recipe.stage}' makes conversations of its preferences while it runs"
        repair = "llm-align data --stage dpo shows the preferences themselves"
        raise UserError(Problem("--stage", found, f"another stage, or one of {', '.join(KINDS)}", repair))
    data = prepare_preferences(settings, encoder, max_length=length, seed=seed, kind=KINDS[recipe.stage])
    firsts = np.cumsum([0, *data.train.completions]).tolist()
    return data.report, as_rows(data.train), Items(data.train.sources, firsts)


def _as_rows(prompts: Prompts) -> TokenizedRows:
    """Return prompts as rows of which nothing is learnt."""
    ids = np.concatenate([np.asarray(prompt.ids, dtype=np.int32) for prompt in prompts])
    starts = np.concatenate([[0], np.cumsum(prompts.lengths)]).astype(np.int64)
    arrays = {"input_ids": ids, "trained": np.zeros(len(ids), dtype=bool), "starts": starts}
    return TokenizedRows(arrays, prompts.places, [prompt.source for prompt in prompts])


def write_page(facts: Facts, path: Path) -> None:
    """Write the facts as one page that stands alone.

    Raises:
        UserError: the file cannot be written.
    """
    folders = [Path(__file__).parent, Path(finetune.training.__path__[0])]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True)
    try:
        path.write_text(environment.get_template("data.html.j2").render(facts), encoding="utf-8")
    except OSError as error:
        found = f"cannot be written: {error.strerror}"
        raise UserError(Problem(f"--html {path}", found, "a file in a folder that is there")) from error


def _chosen(sources: Sequence[int], count: int) -> list[int]:
    """Return the rows to show: of each source in turn, at even distances."""
    own = [np.flatnonzero(np.asarray(sources) == number) for number in sorted(set(sources))]
    each = -(-count // len(own))
    shown = [rows[np.linspace(0, len(rows) - 1, min(each, len(rows)), dtype=int)] for rows in own]
    turns = chain.from_iterable(zip_longest(*shown))
    return [int(index) for index in turns if index is not None][:count]


def _row(rows: TokenizedRows, index: int, encoder: Encoder) -> Facts:
    """Return a row as stretches of text, learnt or not; a stretch that was cut may end in half a letter."""
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
    """Return the text of some tokens as it stands behind the ones before: alone it would lose its blank."""
    before, whole = (
        str(encoder.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)) for stop in (start, end)
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return str(encoder.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))


def _lengths(lengths: Sequence[int]) -> Facts:
    """Return how long rows are, in tokens: a few numbers, and a histogram of at most twelve bars."""
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
