"""Find pipeline files by name and parse them; reports all problems at once."""

from pathlib import Path

from pydantic import ValidationError

from align.pipeline.settings import PipelineSettings
from finetune.recipe import yaml_file
from finetune.recipe.discovery import recipe_folders
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.yaml_file import LineNumbers

PIPELINES_FOLDER = "pipelines"
"""Folder of the pipelines, next to those of the stages' recipes."""


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
