"""Table and options of the graders."""

from finetune.recipe.discovery import load_plugin, plugin_summary
from finetune.recipe.graders import GRADERS, grader_names
from finetune.recipe.settings import Section
from tools.docs.keys import option_rows
from tools.docs.markdown import code, table


def graders() -> str:
    """Return the graders: name and what each grades."""
    rows = [(code(name), plugin_summary(GRADERS, name).partition(": ")[2]) for name in grader_names()]
    return table(("grader", "what it grades"), rows)


def options() -> str:
    """Return the options of each grader that has some."""
    rows = []
    for name in grader_names():
        schema: type[Section] | None = vars(load_plugin(GRADERS, name, where="docs")).get("Options")
        if schema is not None:
            rows += [(code(name), *row) for row in option_rows(schema)]
    return table(("grader", "option", "meaning", "default", "values"), rows)
