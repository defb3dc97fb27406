"""Contradictions within a mixture of sources, and within the choice of rows."""

from collections.abc import Iterator
from math import fsum

from finetune.recipe.errors import Problem
from finetune.recipe.settings import MixedSource, SelectSettings, StageSettings

BY_SIZE = ("mix_limit", "mix_temperature")
MIXTURE_ONLY = (*BY_SIZE, "mix_rows")
OF_ONE_SOURCE = ("columns", "revision", "select")
"""Keys that speak of one source's rows: in a mixture each entry has its own."""


def mixture(settings: StageSettings) -> Iterator[Problem]:
    """Yield what is wrong between the keys of a mixture."""
    data = settings.data
    given = data.model_dump(exclude_defaults=True)
    if data.mix is None:
        for key in filter(given.__contains__, MIXTURE_ONLY):
            repair = "leave it out, or list the sources in data.mix"
            yield Problem(f"data.{key}", "given without data.mix", "a mixture of sources", repair)
        return
    for key in filter(given.__contains__, OF_ONE_SOURCE):
        if key != "columns" or not isinstance(data.held_out, str):  # a held-out file may need its own
            repair = f"data.mix=[{{source: ..., {key}: ...}}]"
            yield Problem(
                f"data.{key}", "given beside data.mix", "the key in the entries of data.mix", repair
            )
    yield from _rates(data.mix, by_size=[key for key in BY_SIZE if key in given])


def _rates(mix: list[MixedSource], *, by_size: list[str]) -> Iterator[Problem]:
    for index, part in enumerate(mix):
        if part.weight is not None and part.share is not None:
            found = f"weight {part.weight:g} beside share {part.share:g}"
            expected = "one of the two: a share is of the whole mixture, weights divide what shares leave"
            yield Problem(f"data.mix[{index}]", found, expected)
    yield from _shares([part.share for part in mix])
    weights = [part.weight for part in mix if part.share is None]
    if None in weights and weights.count(None) < len(weights):
        index = next(i for i, part in enumerate(mix) if part.weight is None and part.share is None)
        repair = "give it a weight, or a share of its own; without any weights, sizes decide"
        yield Problem(f"data.mix[{index}].weight", "not given, but others are", "a weight for each", repair)
    elif weights and None not in weights:
        for key in by_size:
            repair = f"leave out data.{key}, or the weights"
            found = "given beside weights, which say the rates already"
            yield Problem(f"data.{key}", found, "rates by weight or by size", repair)


def _shares(shares: list[float | None]) -> Iterator[Problem]:
    given = [share for share in shares if share is not None]
    if len(given) == len(shares):
        repair = "leave the share of the main source out, or write weight in place of share everywhere"
        found = "every source has a share"
        yield Problem("data.mix", found, "a source without one, which takes the rest", repair)
    elif fsum(given) >= 1:
        found = f"the shares add up to {fsum(given):g}"
        yield Problem("data.mix", found, "less than 1, for the sources without a share take the rest")


def selection(settings: StageSettings) -> Iterator[Problem]:
    """Yield what is wrong between the keys of a choice of rows."""
    data = settings.data
    chosen = {f"data.mix[{index}].select": part.select for index, part in enumerate(data.mix or [])}
    for where, select in {"data.select": data.select, **chosen}.items():
        if select is not None:
            yield from _select(where, select)


def _select(where: str, select: SelectSettings) -> Iterator[Problem]:
    least, most = select.min_reply_characters, select.max_reply_characters
    if most is not None and most < least:
        found = f"{most}, below min_reply_characters ({least})"
        yield Problem(f"{where}.max_reply_characters", found, f"{least} or more")
    if select.score is None:
        repair = "name the column: score: COLUMN"
        if select.min_score is not None:
            yield Problem(f"{where}.min_score", "given without score", "the column that rates rows", repair)
        if select.rows_by == "score":
            yield Problem(
                f"{where}.rows_by", "'score', but score is not given", "a column of ratings", repair
            )
    elif select.min_score is None and select.rows_by != "score":
        repair = "min_score: 4.5 keeps rows rated at least that; rows_by: score keeps the best rows"
        yield Problem(f"{where}.score", "given, but nothing is chosen by it", "min_score or rows_by", repair)
    if select.rows_by != "random" and select.rows is None:
        found = f"'{select.rows_by}', but rows is not given"
        yield Problem(f"{where}.rows_by", found, "the number of rows to keep", "rows: 1000")
