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
from numpy.typing import NDArray

from align.preference.rows.comparison_rows import PREFERENCE_KINDS
from align.preference.rows.dataset import to_completion_rows
from align.preference.rows.prepare import prepare_preferences
from align.preference.settings import PreferenceSettings
from align.reward.settings import RewardSettings
from align.rl.prompts import Prompts, prepare_prompts, resolve_max_prompt_length
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.data.dataset import TokenizedRows
from finetune.data.documents import prepare_data
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.discovery import load_stage
from finetune.recipe.limits import Change, fit_to_rows
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings, TrainSettings
from finetune.training.auto_values import optimizer_steps
from finetune.training.model import TextEncoding, build_text_encoding
from finetune.training.pages import page_template, write_named_page

MAX_BARS = 12
"""Maximum bars of the histogram."""

BAR_WIDTHS = (1, 2, 4, 5, 8)
"""Bar widths are one of these times a power of ten, for readable bin edges."""

PreviewData = dict[str, Any]


def preview(recipe: Recipe, *, rows: int) -> PreviewData:
    """Prepare a recipe's data and return the preview as plain data.

    Args:
        recipe: the loaded recipe.
        rows: number of rows to show.

    Raises:
        UserError: invalid data (with file, line and field), or unknown base.
    """
    settings = recipe.settings
    text, reason = build_text_encoding(settings)
    max_length, reason = _max_row_length(recipe, text, reason)
    report, tokenized, items = _prepare_data(recipe, text, max_length)
    train, changes = _fitted_train(recipe, report, len(items.sources))
    report.notes += [change.line() for change in changes]
    return {
        "stage": recipe.stage,
        "recipe": recipe.name,
        "description": recipe.description,
        "base": settings.model.base,
        "template": settings.data.template,
        "max_length": max_length,
        "max_length_reason": reason,
        **{key: value for key, value in asdict(report).items() if key not in ("counts", "examples")},
        "trained_share": report.trained_tokens / report.tokens,
        "counts": [
            {"what": what, "rows": number, "first": report.examples[what]}
            for what, number in report.counts.items()
        ],
        "lengths": _length_statistics(tokenized.lengths),
        **_training_budget(report, len(items.sources), train),
        "shown": [
            _shown_row(tokenized, index, text.encoder)
            for item in _rows_to_show(items.sources, rows)
            for index in range(*items.rows[item : item + 2])
        ],
    }


def _fitted_train(recipe: Recipe, report: DataReport, num_rows: int) -> tuple[TrainSettings, list[Change]]:
    """Return the training settings that a run over N rows has, and what was scaled to the rows."""
    if report.prompts:
        return recipe.settings.train, []

    def steps_with(settings: StageSettings) -> int:
        train = settings.train
        return optimizer_steps(
            num_rows, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
        )

    fitted, changes = fit_to_rows(recipe.settings, num_rows, steps_with)
    return fitted.train, changes


def _training_budget(report: DataReport, count: int, train: TrainSettings) -> PreviewData:
    """Return epochs, steps and token budget for N items; None for prompts, whose stages count otherwise."""
    if report.prompts:
        return {key: None for key in ("epochs", "steps", "token_budget", "trained_token_budget")} | {
            "batch_size": train.batch_size
        }
    steps = optimizer_steps(
        count, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )
    items_seen = train.max_steps * train.batch_size if train.max_steps else count * train.epochs
    return {
        "epochs": items_seen / count,
        "batch_size": train.batch_size,
        "steps": steps,
        "token_budget": round(report.tokens / count * items_seen),
        "trained_token_budget": round(report.trained_tokens / count * items_seen),
    }


@dataclass(frozen=True, slots=True)
class BatchItems:
    """The items of a batch: source and first row of each; a comparison has one row per completion."""

    sources: Sequence[int] | NDArray[np.int32]
    rows: Sequence[int]


def _max_row_length(recipe: Recipe, text: TextEncoding, reason: str) -> tuple[int, str]:
    """Return the maximum tokens per row and the reason; for prompts, what the completions leave."""
    settings = recipe.settings.data
    if not isinstance(settings, PromptSettings):
        return text.max_length, reason
    sampling = dict(recipe.settings)["sampling"]
    assert isinstance(sampling, SamplingSettings), "stages on prompts have sampling settings"
    return resolve_max_prompt_length(settings, text, max_new_tokens=sampling.max_new_tokens)


def _prepare_data(
    recipe: Recipe, text: TextEncoding, length: int
) -> tuple[DataReport, TokenizedRows, BatchItems]:
    """Return report, tokenized rows and items of conversations, texts, prompts or comparisons.

    Raises:
        UserError: invalid data.
    """
    settings, encoder = recipe.settings.data, text.encoder
    seed = recipe.settings.train.seed
    if isinstance(settings, PromptSettings):
        prompts = prepare_prompts(settings, encoder, max_prompt_length=length, seed=seed)
        sources = [prompt.source_index for prompt in prompts.train]
        return (
            prompts.report,
            _prompts_as_rows(prompts.train),
            BatchItems(sources, range(len(prompts.train) + 1)),
        )
    stage = load_stage(recipe.stage)
    if hasattr(stage, "prepare_rows") or not isinstance(settings, PreferenceSettings):
        # Chain of hindsight trains on conversations that it makes of preferences.
        dataset = (
            stage.prepare_rows(recipe.settings, text)
            if hasattr(stage, "prepare_rows")
            else prepare_data(settings, encoder, max_length=length, seed=seed)
        )
        return (
            dataset.report,
            dataset.train,
            BatchItems(dataset.train.source_ids, range(len(dataset.train) + 1)),
        )
    reward = dict(recipe.settings).get("reward")
    data = prepare_preferences(
        settings,
        encoder,
        max_length=length,
        seed=seed,
        kind=PREFERENCE_KINDS.get(recipe.stage, "rankings"),
        use_margin=isinstance(reward, RewardSettings) and reward.margin_scale is not None,
    )
    firsts = np.cumsum([0, *data.train.num_completions]).tolist()
    return data.report, to_completion_rows(data.train), BatchItems(data.train.source_ids, firsts)


def _prompts_as_rows(prompts: Prompts) -> TokenizedRows:
    """Return prompts as rows whose loss mask is all False."""
    ids = np.concatenate([np.asarray(prompt.ids, dtype=np.int32) for prompt in prompts])
    starts = np.concatenate([[0], np.cumsum(prompts.lengths)]).astype(np.int64)
    arrays = {"input_ids": ids, "loss_mask": np.zeros(len(ids), dtype=bool), "offsets": starts}
    return TokenizedRows(arrays, prompts.locations, [prompt.source_index for prompt in prompts])


def write_page(preview_data: PreviewData, path: Path) -> None:
    """Write the preview as a self-contained HTML page.

    Raises:
        UserError: the file cannot be written.
    """
    write_named_page(page_template(Path(__file__).parent, "data.html.j2").render(preview_data), path)


def _rows_to_show(sources: Sequence[int] | NDArray[np.int32], count: int) -> list[int]:
    """Return evenly spaced rows to show, alternating between sources."""
    rows_by_source = [
        np.flatnonzero(np.asarray(sources) == number) for number in np.unique(np.asarray(sources))
    ]
    rows_per_source = -(-count // len(rows_by_source))
    shown = [
        rows[np.linspace(0, len(rows) - 1, min(rows_per_source, len(rows)), dtype=int)]
        for rows in rows_by_source
    ]
    interleaved = chain.from_iterable(zip_longest(*shown))
    return [int(index) for index in interleaved if index is not None][:count]


def _shown_row(rows: TokenizedRows, index: int, encoder: Encoder) -> PreviewData:
    """Return a row as text spans with their loss mask; a truncated span may end within a character."""
    start, end = rows.arrays["offsets"][index : index + 2]
    ids, loss_mask = (rows.arrays[key][start:end].tolist() for key in ("input_ids", "loss_mask"))
    spans, span_end = [], 0
    for is_trained, group in groupby(loss_mask):
        span_start, span_end = span_end, span_end + len(list(group))
        spans.append({"text": _text_between(ids, span_start, span_end, encoder), "trained": is_trained})
    return {
        "where": rows.locations[index],
        "source": int(rows.source_ids[index]),
        "tokens": len(ids),
        "trained_tokens": sum(loss_mask),
        "pieces": spans,
    }


def _text_between(ids: list[int], start: int, end: int, encoder: Encoder) -> str:
    """Return the text of tokens start to end."""
    # Decoded after the tokens before them: alone, many tokenizers drop the leading space.
    prefix, full_text = (
        str(encoder.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)) for stop in (start, end)
    )
    if full_text.startswith(prefix):
        return full_text[len(prefix) :]
    return str(encoder.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))


def _length_statistics(lengths: Sequence[int]) -> PreviewData:
    """Return statistics of the row lengths in tokens, with a histogram of at most MAX_BARS bars."""
    longest = max(lengths)
    width = _bar_width(longest)
    # The first bar is 1 to width: no row has length 0.
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
    while BAR_WIDTHS[-1] * power * MAX_BARS < longest:
        power *= 10
    return next(factor * power for factor in BAR_WIDTHS if factor * power * MAX_BARS >= longest)
