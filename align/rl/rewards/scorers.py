"""Metadata of a reward run, finished or planned, without loading its model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from align.reward.settings import Settings
from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.checks import adapter_traits
from finetune.recipe.discovery import find_recipe
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe, load
from finetune.recipe.runs import ALL_RUNS, find_run, finished_record
from finetune.recipe.settings import ModelSettings, StageSettings
from finetune.recipe.start import is_recipe, refuse_lost_files

STAGE = "reward"
LONE_HEAD = "reward"
"""Default name of a reward, and of a reward recipe's only head."""
ALL_TOGETHER = "total"
_PENDING: ContextVar[Mapping[str, Recipe] | None] = ContextVar("pending", default=None)


@dataclass(frozen=True, slots=True)
class Scorer:
    """A reward run: base model, whether it is fully fine-tuned, template, names of its scores."""

    model: ModelSettings
    whole: bool
    template: str
    scores: list[str]


@contextmanager
def pending(recipes: Mapping[str, Recipe]) -> Iterator[None]:
    """Resolve names to reward recipes that have not run yet, within the block (for pipelines)."""
    before = _PENDING.set(recipes)
    try:
        yield
    finally:
        _PENDING.reset(before)


def scorer_of(text: str, *, where: str) -> Scorer:
    """Return the metadata of a reward run, named as in ``reward.sources``.

    Args:
        text: a run's folder, its name or a prefix of it; or ``reward/recipe``.
        where: the recipe key, for the error message.

    Raises:
        UserError: there is no such run, it is not finished, of another stage, or its files are missing; or
            the recipe is invalid or depends on itself.
    """
    if text in (waiting := _PENDING.get() or {}):
        return _of_settings(waiting[text].settings)
    return _of_recipe(text, where) if is_recipe(text) else _of_run(text, where)


def same_base(one: ModelSettings, other: ModelSettings) -> bool:
    """Return whether two model sections refer to the same base weights."""
    if (one.revision, one.rope) != (other.revision, other.rope):
        return False
    try:
        return one.base == other.base or resolve_base(one.base) == resolve_base(other.base)
    except UserError:
        return False


def _of_run(text: str, where: str) -> Scorer:
    run, _ = find_run(text, where=where)
    record = finished_record(run)
    load: dict[str, Any] = record["load"]
    if "heads" not in load:
        raise UserError(_other_stage(where, f"'{run}' is a run", record["stage"]))
    refuse_lost_files(run, record, where=where)
    names = [*load["heads"], *(rule["name"] for rule in load["rules"]), ALL_TOGETHER]
    return Scorer(ModelSettings(**load["model"]), (run / "model").is_dir(), load["template"], names)


def _of_recipe(text: str, where: str) -> Scorer:
    stage, _, name = text.partition("/")
    if stage != STAGE:
        raise UserError(_other_stage(where, f"'{text}' is a recipe", stage))
    if way := _circle(text, ()):
        found = f"circular dependency: {' -> '.join(way)}"
        raise UserError(Problem(where, found, "a reward run that does not depend on this one"))
    return _of_settings(load(stage, name).settings)


def _of_settings(settings: StageSettings) -> Scorer:
    assert isinstance(settings, Settings)
    reward, whole = settings.reward, adapter_traits(settings.adapter.method).whole_model
    names = [*reward.heads, *(rule.name for rule in reward.rules), ALL_TOGETHER]
    return Scorer(settings.model, whole, settings.data.template, names)


def _other_stage(where: str, found: str, stage: str) -> Problem:
    told = f"{found} of stage {stage}, which is no reward model"
    return Problem(where, told, "a run of stage reward, or reward/recipe", ALL_RUNS)


def _circle(text: str, above: tuple[str, ...]) -> tuple[str, ...]:
    """Return a cycle of recipes that start from or are rewarded by each other, or an empty tuple."""
    if text in above:
        return (*above[above.index(text) :], text)
    found = (_circle(other, (*above, text)) for other in _needed(text))
    return next((way for way in found if way), ())


def _needed(text: str) -> Iterator[str]:
    """Yield the recipes that a recipe's file depends on; other mistakes are reported when it is loaded."""
    stage, _, name = text.partition("/")
    content = yaml_file.read(find_recipe(stage, name))[0]
    model, reward = content.get("model"), content.get("reward")
    named = [model.get("start")] if isinstance(model, dict) else []
    sources = reward.get("sources") if isinstance(reward, dict) else []
    for source in sources if isinstance(sources, list) else [sources]:
        named.append(source.get("run") if isinstance(source, dict) else source)
    yield from (one for one in named if isinstance(one, str) and is_recipe(one))
