"""Find pipeline files by name and parse them; reports all problems at once."""

from pathlib import Path

from pydantic import ValidationError

from align.pipeline.settings import FileSettings
from finetune.recipe import yaml_file
from finetune.recipe.discovery import recipe_folders
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.wording import problems_of
from finetune.recipe.yaml_file import Lines

PIPELINES = "pipelines"
"""Folder of the pipelines, next to those of the stages' recipes."""


def pipeline_names() -> dict[str, Path]:
    """Return pipelines by name, from ``recipes/pipelines/*.yaml``; the user's override shipped ones."""
    folders = [folder / PIPELINES for folder in reversed(recipe_folders())]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def pipeline_lines() -> dict[str, str]:
    """Return a one-line description of each pipeline, or why it cannot be read."""
    lines = {}
    for name, path in pipeline_names().items():
        try:
            lines[name] = str(yaml_file.read(path)[0].get("description") or "")
        except UserError as error:
            lines[name] = f"cannot be read: {error.problems[0].found}"
    return lines


def find_pipeline(name: str) -> Path:
    """Return the file of a pipeline, by name or path.

    Raises:
        UserError: it does not exist; the message lists the known pipelines.
    """
    known = pipeline_names()
    if name in known:
        return known[name]
    where = f"pipeline '{name}'"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise UserError(Problem(where, "no such file", "a pipeline's YAML file", nearest(path.stem, known)))
    expected = f"{one_of(sorted(known))}, or the path of a .yaml file"
    raise UserError(Problem(where, "unknown pipeline", expected, nearest(name, known)))


def read_pipeline(path: Path) -> tuple[FileSettings, Lines]:
    """Parse a pipeline file; returns its settings and the line numbers of its keys.

    Raises:
        UserError: invalid YAML, unknown keys or values of the wrong type.
    """
    content, lines = yaml_file.read(path)
    try:
        return FileSettings.model_validate(content), lines
    except ValidationError as error:
        places = {".".join(("pipeline", *key)): f"{path.name}:{line}" for key, line in lines.items()}
        problems = problems_of("pipeline", error, model=FileSettings)
        raise UserError([_shorter(problem.placed(places)) for problem in problems]) from error


def _shorter(problem: Problem) -> Problem:
    """Return a problem located by the file's keys, without the prefix `pipeline.`."""
    where = problem.where.removeprefix("pipeline.")
    return Problem(where, problem.found, problem.expected, problem.repair)
