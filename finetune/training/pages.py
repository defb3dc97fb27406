"""Self-contained HTML pages: templates with the pages' style, in which every text is escaped."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

from finetune.recipe.disk import OUTPUT_REPAIR, is_write_error, storage_error
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.visible_text import visible_value

FOLDER = Path(__file__).parent
"""Folder of ``style.css`` and of the parts that several pages include."""


@cache
def page_template(folder: Path, name: str) -> Template:
    """Return a page's template; it may include the files of ``finetune/training``.

    Args:
        folder: its folder.
        name: its file name.
    """
    loader = FileSystemLoader([folder, FOLDER])
    environment = Environment(loader=loader, autoescape=True, finalize=visible_value)
    return environment.get_template(name)


def write_named_page(page: str, path: Path) -> None:
    """Write a page to the file that ``--html`` names.

    Raises:
        UserError: the file cannot be written.
        StorageError: the disk is full or read-only.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        if is_write_error(error):
            raise storage_error(error, path, needed=len(page), repair=OUTPUT_REPAIR) or error from error
        actual = f"cannot be written: {error.strerror}"
        raise UserError(Problem(f"--html {path}", actual, "a file in an existing folder")) from error
