"""What is known of a reward run, made or still to be made, before anything of it is loaded."""

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
"""What a reward is called that has no better name, as the head of a reward recipe is."""
ALL_TOGETHER = "total"
_PENDING: ContextVar[Mapping[str, Recipe] | None] = ContextVar("pending", default=None)


@dataclass(frozen=True, slots=True)
class Scorer:
    """A reward run: its base, whether it tuned all of its weights, its template, the names of its scores."""

    model: ModelSettings
    whole: bool
    template: str
    scores: list[str]


@contextmanager
def pending(recipes: Mapping[str, Recipe]) -> Iterator[None]:
    """Let names stand for the runs that recipes of stage reward will make, while the block lasts."""
    before = _PENDING.set(recipes)
    try:
        yield
    finally:
        _PENDING.reset(before)


def scorer_of(text: str, *, where: str) -> Scorer:
    """Return what is known of a reward run, given as ``reward.sources`` does.

    Args:
        text: a run's folder, name or its beginning; or ``reward/recipe``.
        where: the recipe's key, for the message.

    Raises:
        UserError: there is no such run, it is not finished, of another stage, or has lost its files; or the
            recipe has mistakes, or leads back to itself.
    """
    if text in (waiting := _PENDING.get() or {}):
        return _of_settings(waiting[text].settings)
    return _of_recipe(text, where) if is_recipe(text) else _of_run(text, where)


def same_base(one: ModelSettings, other: ModelSettings) -> bool:
    """Tell whether two model sections mean the same weights."""
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
        found = f"a circle: {' -> '.join(way)}"
        raise UserError(Problem(where, found, "a reward that can be made before this run"))
    return _of_settings(load(stage, name).settings)


def _of_settings(settings: StageSettings) -> Scorer:
    assert isinstance(settings, Settings)
    reward, whole = settings.reward, adapter_traits(settings.adapter.method).whole_model
    names = [*reward.heads, *(rule.name for rule in reward.rules), ALL_TOGETHER]
    return Scorer(settings.model, whole, settings.data.template, names)


def _other_stage(where: str, found: str, stage: str) -> Problem:
    told = f"{found} of stage {stage}, whose model gives no scores"
    return Problem(where, told, "a run of stage reward, or reward/recipe", ALL_RUNS)


def _circle(text: str, above: tuple[str, ...]) -> tuple[str, ...]:
    """Return the recipes that lead from one of them back to it; none where every way ends."""
    if text in above:
        return (*above[above.index(text) :], text)
    found = (_circle(other, (*above, text)) for other in _needed(text))
    return next((way for way in found if way), ())


def _needed(text: str) -> Iterator[str]:
    """Yield the recipes whose runs a recipe's file needs first; mistakes in it are told when it is loaded."""
    stage, _, name = text.partition("/")
    content = yaml_file.read(find_recipe(stage, name))[0]
    model, reward = content.get("model"), content.get("reward")
    named = [model.get("start")] if isinstance(model, dict) else []
    sources = reward.get("sources") if isinstance(reward, dict) else []
    for source in sources if isinstance(sources, list) else [sources]:
        named.append(source.get("run") if isinstance(source, dict) else source)
    yield from (one for one in named if isinstance(one, str) and is_recipe(one))
