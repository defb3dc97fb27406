"""Tables of the graders, of evaluation suites and of their layouts."""

from finetune.evaluation.suites import LAYOUTS, load_suite, suite_names
from finetune.recipe.discovery import load_plugin, plugin_names, plugin_summary
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


def suites() -> str:
    """Return the shipped suites: name, what each measures, task, purpose, rows and metrics."""
    rows = []
    for name in suite_names():
        suite = load_suite(name)
        settings = suite.settings
        metrics = ", ".join(metric.name for metric in suite.metrics)
        source = code(settings.data.source)
        rows.append((code(name), settings.description, settings.task, settings.purpose, source, metrics))
    return table(("suite", "what it measures", "task", "purpose", "rows", "metrics"), rows)


def layouts() -> str:
    """Return the layouts of published benchmarks."""
    rows = [(code(name), plugin_summary(LAYOUTS, name).partition(": ")[2]) for name in plugin_names(LAYOUTS)]
    return table(("layout", "what it measures"), rows)
