"""Pipeline files: their schema, finding them by name, and parsing; reports all problems at once."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from finetune.recipe import yaml_file
from finetune.recipe.discovery import recipe_folders
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.settings import NonEmptyStr, Section
from finetune.recipe.yaml_file import LineNumbers

PIPELINES_FOLDER = "pipelines"
"""Folder of the pipelines, next to those of the stages' recipes."""
REWARDS_KEY = "rewards.sources"
"""Recipe key of the rewards of an RL stage."""


class StageEntrySettings(Section):
    """One stage of a pipeline."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    recipe: NonEmptyStr = Field(description="stage/recipe (sft/quickstart), or the path of a .yaml file")
    init_from: NonEmptyStr | None = Field(
        None, alias="from", description="earlier stage of this file to initialize from"
    )
    reward: NonEmptyStr | Annotated[list[NonEmptyStr], Field(min_length=1)] | None = Field(
        None, description="earlier stage of this file that trains the reward model, or a list of them"
    )
    overrides: dict[str, Any] = Field(
        {}, alias="set", description="overrides of the recipe's settings: {train.epochs: 2}"
    )

    @property
    def rewards(self) -> list[str]:
        """Return the reward model stages; may be empty."""
        if isinstance(self.reward, str):
            return [self.reward]
        return self.reward or []


StageEntries = Annotated[dict[NonEmptyStr, StageEntrySettings], Field(min_length=1)]


class PipelineSettings(Section):
    """A pipeline's file."""

    description: str = Field("", description="one line for `llm-align list pipelines`")
    stages: StageEntries = Field(
        description="name: {recipe: stage/recipe, from: NAME, reward: NAME, set: {...}}"
    )
    public: StageEntries | None = Field(None, description="stages for bases other than the bundled one")


def pipeline_names() -> dict[str, Path]:
    """Return pipelines by name, from ``recipes/pipelines/*.yaml``; the user's override shipped ones."""
    # Reversed: of equal names the last one wins in the dict below, and that must be the user's.
    folders = [folder / PIPELINES_FOLDER for folder in reversed(recipe_folders())]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def pipeline_descriptions() -> dict[str, str]:
    """Return a one-line description of each pipeline, or why it cannot be read."""
    descriptions = {}
    for name, path in pipeline_names().items():
        try:
            descriptions[name] = str(yaml_file.read_yaml(path)[0].get("description") or "")
        except UserError as error:
            descriptions[name] = f"cannot be read: {error.problems[0].actual}"
    return descriptions


def find_pipeline(name: str) -> Path:
    """Return the file of a pipeline, by name or path.

    Raises:
        UserError: it does not exist; the message lists the known pipelines.
    """
    pipelines = pipeline_names()
    if name in pipelines:
        return pipelines[name]
    where = f"pipeline '{name}'"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise UserError(
            Problem(where, "no such file", "a pipeline's YAML file", did_you_mean(path.stem, pipelines))
        )
    expected = f"{one_of(sorted(pipelines))}, or the path of a .yaml file"
    raise UserError(Problem(where, "unknown pipeline", expected, did_you_mean(name, pipelines)))


def read_pipeline(path: Path) -> tuple[PipelineSettings, LineNumbers]:
    """Return a pipeline file's settings and the line numbers of its keys.

    Raises:
        UserError: invalid YAML, unknown keys or values of the wrong type.
    """
    content, line_numbers = yaml_file.read_yaml(path)
    try:
        return PipelineSettings.model_validate(content), line_numbers
    except ValidationError as error:
        locations = {
            ".".join(("pipeline", *key)): f"{path.name}:{line_number}"
            for key, line_number in line_numbers.items()
        }
        problems = validation_problems("pipeline", error, model=PipelineSettings)
        raise UserError([_without_prefix(problem.with_origin(locations)) for problem in problems]) from error


def _without_prefix(problem: Problem) -> Problem:
    """Return a problem located by the file's keys, without the prefix `pipeline.`."""
    where = problem.where.removeprefix("pipeline.")
    return Problem(where, problem.actual, problem.expected, problem.repair)
