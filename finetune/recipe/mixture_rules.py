"""Rules of ``data.mix`` (rates, shares, weights) and of ``select``."""

from collections.abc import Iterator
from math import fsum

from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import MixedSource, SelectSettings, StageSettings

SIZE_RATE_KEYS = ("mix_size_cap", "mix_temperature")
MIXTURE_KEYS = (*SIZE_RATE_KEYS, "epoch_rows")
PER_SOURCE_KEYS = ("columns", "revision", "select")
"""Keys of a single source: in a mixture each entry has its own."""


def _check_mixture(settings: StageSettings) -> Iterator[Problem]:
    """Yield the problems between the keys of a mixture."""
    data = settings.data
    given = data.model_dump(exclude_defaults=True)
    if data.mix is None:
        for key in filter(given.__contains__, MIXTURE_KEYS):
            repair = "omit it, or list the sources in data.mix"
            yield Problem(f"data.{key}", "set without data.mix", "a mixture of sources", repair)
        return
    for key in filter(given.__contains__, PER_SOURCE_KEYS):
        if key != "columns" or not isinstance(
            data.held_out, str | PythonRows
        ):  # a held-out file may need its own
            repair = f"data.mix=[{{source: ..., {key}: ...}}]"
            yield Problem(
                f"data.{key}", "set together with data.mix", "the key in the entries of data.mix", repair
            )
    yield from _check_rates(data.mix, by_size=[key for key in SIZE_RATE_KEYS if key in given])


def _check_rates(mix: list[MixedSource], *, by_size: list[str]) -> Iterator[Problem]:
    for index, entry in enumerate(mix):
        if entry.weight is not None and entry.share is not None:
            actual = f"both weight {entry.weight:g} and share {entry.share:g}"
            expected = "one of the two: a share is a fraction of the mixture, weights divide the rest"
            yield Problem(f"data.mix[{index}]", actual, expected)
    yield from _check_shares([entry.share for entry in mix])
    # Weights or sizes define the rates of all sources without a share; mixing the two has no meaning.
    weights = [entry.weight for entry in mix if entry.share is None]
    if None in weights and weights.count(None) < len(weights):
        index = next(i for i, entry in enumerate(mix) if entry.weight is None and entry.share is None)
        repair = "set its weight or its share, or remove all weights to mix by size"
        yield Problem(f"data.mix[{index}].weight", "not set, but others are", "a weight for each", repair)
    elif weights and None not in weights:
        for key in by_size:
            repair = f"omit data.{key}, or the weights"
            actual = "set together with weights, which already define the rates"
            yield Problem(f"data.{key}", actual, "rates by weight or by size", repair)


def _check_shares(shares: list[float | None]) -> Iterator[Problem]:
    given = [share for share in shares if share is not None]
    if len(given) == len(shares):
        repair = "omit the share of the main source, or replace every share by a weight"
        actual = "every source has a share"
        yield Problem("data.mix", actual, "at least one source without a share, which gets the rest", repair)
    # fsum is exactly rounded: ten shares of 0.1 add up to 1, and not to 0.9999999999999999.
    elif fsum(given) >= 1:
        actual = f"the shares add up to {fsum(given):g}"
        yield Problem("data.mix", actual, "less than 1: the sources without a share get the rest")


def _check_selection(settings: StageSettings) -> Iterator[Problem]:
    """Yield the problems between the keys of ``select``."""
    data = settings.data
    entry_selects = {f"data.mix[{index}].select": entry.select for index, entry in enumerate(data.mix or [])}
    for where, select in {"data.select": data.select, **entry_selects}.items():
        if select is not None:
            yield from _check_select(where, select)


def _check_select(where: str, select: SelectSettings) -> Iterator[Problem]:
    min_characters, max_characters = select.min_reply_characters, select.max_reply_characters
    if max_characters is not None and max_characters < min_characters:
        actual = f"{max_characters}, below min_reply_characters ({min_characters})"
        yield Problem(f"{where}.max_reply_characters", actual, f"{min_characters} or more")
    if select.score is None:
        repair = "name the column: score: COLUMN"
        if select.min_score is not None:
            yield Problem(f"{where}.min_score", "set without score", "the column with the ratings", repair)
        if select.rows_by == "score":
            yield Problem(
                f"{where}.rows_by", "'score', but score is not set", "the column with the ratings", repair
            )
    elif select.min_score is None and select.rows_by != "score":
        repair = "min_score: 4.5 sets a minimum rating; rows_by: score selects the best rows"
        yield Problem(f"{where}.score", "set, but not used", "min_score or rows_by", repair)
    if select.rows_by != "random" and select.rows is None:
        actual = f"'{select.rows_by}', but rows is not set"
        yield Problem(f"{where}.rows_by", actual, "the number of rows to select", "rows: 1000")


MIXTURE_RULES = (
    Rule(
        "mixture",
        message="weights, shares or sizes define the rates of a mixture, and shares add up to less than 1",
        source="finetune/data/mixture.py",
        find=_check_mixture,
        reads=("data",),
    ),
    Rule(
        "select",
        message="filters by a rating name its column",
        source="finetune/data/selection.py",
        find=_check_selection,
        reads=("data",),
    ),
)
