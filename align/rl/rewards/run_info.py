"""Metadata of a reward run, finished or planned, without loading its model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from align.reward.settings import Settings
from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.discovery import adapter_traits, find_recipe
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.parent_run import check_saved_files, is_recipe_name
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.runs import LIST_RUNS_HINT, find_run, read_finished_record
from finetune.recipe.settings import ModelSettings, StageSettings

REWARD_STAGE = "reward"
DEFAULT_REWARD_NAME = "reward"
"""Default name of a reward, and of a reward recipe's only head."""
# The value of `scorer.TOTAL`, whose module imports torch; settings are checked without it.
TOTAL_SCORE = "total"
# A context variable: a rule checks the rewards, and has no argument for a pipeline's recipes.
_PENDING_RECIPES: ContextVar[Mapping[str, Recipe] | None] = ContextVar("pending", default=None)


@dataclass(frozen=True, slots=True)
class RewardRunInfo:
    """A reward run: base model, whether it is fully fine-tuned, template, names of its scores."""

    model: ModelSettings
    full_model: bool
    template: str
    score_names: list[str]


@contextmanager
def pending_reward_recipes(recipes: Mapping[str, Recipe]) -> Iterator[None]:
    """Resolve names to reward recipes that have not run yet, within the block (for pipelines)."""
    token = _PENDING_RECIPES.set(recipes)
    try:
        yield
    finally:
        _PENDING_RECIPES.reset(token)


def reward_run_info(text: str, *, where: str) -> RewardRunInfo:
    """Return the metadata of a reward run, named as in ``rewards.sources``.

    Args:
        text: a run's folder, its name or a prefix of it; or ``reward/recipe``.
        where: the recipe key, for the error message.

    Raises:
        UserError: there is no such run, it is not finished, of another stage, or its files are missing; or
            the recipe is invalid or depends on itself.
    """
    # A stage of the same pipeline comes before a run or recipe of that name.
    if text in (pending := _PENDING_RECIPES.get() or {}):
        return _info_from_settings(pending[text].settings)
    return _info_from_recipe(text, where) if is_recipe_name(text) else _info_from_run(text, where)


def same_base(first: ModelSettings, second: ModelSettings) -> bool:
    """Return whether two model sections refer to the same base weights."""
    if (first.revision, first.rope) != (second.revision, second.rope):
        return False
    try:
        return first.base == second.base or resolve_base(first.base) == resolve_base(second.base)
    except UserError:
        return False


def _info_from_run(text: str, where: str) -> RewardRunInfo:
    run, _ = find_run(text, where=where)
    record = read_finished_record(run)
    saved: dict[str, Any] = record["reload"]
    if "heads" not in saved:
        raise UserError(_wrong_stage(where, f"'{run}' is a run", record["stage"]))
    check_saved_files(run, record, where=where)
    names = [*saved["heads"], *(rule["name"] for rule in saved["rules"]), TOTAL_SCORE]
    return RewardRunInfo(ModelSettings(**saved["model"]), (run / "model").is_dir(), saved["template"], names)


def _info_from_recipe(text: str, where: str) -> RewardRunInfo:
    stage, _, name = text.partition("/")
    if stage != REWARD_STAGE:
        raise UserError(_wrong_stage(where, f"'{text}' is a recipe", stage))
    if cycle := _find_cycle(text, ()):
        actual = f"circular dependency: {' -> '.join(cycle)}"
        raise UserError(Problem(where, actual, "a reward run that does not depend on this one"))
    return _info_from_settings(read_recipe(stage, name).settings)


def _info_from_settings(settings: StageSettings) -> RewardRunInfo:
    assert isinstance(settings, Settings)
    reward, full_model = settings.reward, adapter_traits(settings.adapter.method).full_finetuning
    names = [*reward.heads, *(rule.name for rule in reward.rules), TOTAL_SCORE]
    return RewardRunInfo(settings.model, full_model, settings.data.template, names)


def _wrong_stage(where: str, subject: str, stage: str) -> Problem:
    actual = f"{subject} of stage {stage}, which is not a reward model"
    return Problem(where, actual, "a run of stage reward, or reward/recipe", LIST_RUNS_HINT)


def _find_cycle(text: str, ancestors: tuple[str, ...]) -> tuple[str, ...]:
    """Return a cycle of recipes that start from or are rewarded by each other, or an empty tuple."""
    if text in ancestors:
        return (*ancestors[ancestors.index(text) :], text)
    cycles = (_find_cycle(dependency, (*ancestors, text)) for dependency in _dependencies(text))
    return next((cycle for cycle in cycles if cycle), ())


def _dependencies(text: str) -> Iterator[str]:
    """Yield the recipes that a recipe's file depends on; other mistakes are reported when it is loaded."""
    stage, _, name = text.partition("/")
    content = yaml_file.read_yaml(find_recipe(stage, name))[0]
    model, reward = content.get("model"), content.get("rewards")
    references = [model.get("init_from")] if isinstance(model, dict) else []
    sources = reward.get("sources") if isinstance(reward, dict) else []
    for source in sources if isinstance(sources, list) else [sources]:
        references.append(source.get("run") if isinstance(source, dict) else source)
    yield from (
        reference for reference in references if isinstance(reference, str) and is_recipe_name(reference)
    )
