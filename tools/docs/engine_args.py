"""Tables of the engines' arguments: those that are passed on, and why the others are not."""

from collections.abc import Iterator, Mapping

from finetune.recipe.discovery import stage_names
from finetune.recipe.engine_arguments import (
    TRAINING_ARGUMENTS,
    TRL_ARGUMENTS,
    Argument,
    ByRecipe,
    Passed,
    Refused,
)
from finetune.recipe.recipe import stage_settings
from finetune.recipe.rules import stage_rules
from tools.docs.markdown import code, table


def passed_on() -> str:
    """Return the arguments that ``train.engine_args`` passes on, with the engines that take them."""
    tables = {"TrainingArguments": TRAINING_ARGUMENTS, **TRL_ARGUMENTS}
    entries: dict[str, tuple[Passed, list[str]]] = {}
    for class_name, arguments in tables.items():
        for name, entry in arguments.items():
            if isinstance(entry, Passed):
                entries.setdefault(name, (entry, []))[1].append(class_name)
    rows = ((code(name), _effect(entry), _engines(names)) for name, (entry, names) in entries.items())
    return table(("argument", "effect", "engine"), rows)


def not_passed_on() -> str:
    """Return the refused arguments of each class, with the recipe key or the reason."""
    parts = []
    for class_name, arguments in {"TrainingArguments": TRAINING_ARGUMENTS, **TRL_ARGUMENTS}.items():
        stages = [name for name in stage_names() if _runs_on_trl(name, class_name)]
        heading = f"{class_name} ({', '.join(stages)})" if stages else f"{class_name} (every engine)"
        rows = ((", ".join(map(code, names)), use) for use, names in _by_use(arguments))
        parts.append(f"### {heading}\n\n{table(('arguments', 'instead'), rows)}")
    return "\n".join(parts)


def _runs_on_trl(stage: str, class_name: str) -> bool:
    """Return whether a stage runs on TRL's trainer with this config."""
    native_only = any(rule.name == "native-only" for rule in stage_rules(stage))
    return class_name == stage_settings(stage).TRL_CONFIG and not native_only


def _by_use(arguments: Mapping[str, Argument]) -> Iterator[tuple[str, list[str]]]:
    """Yield each recipe key or reason with all its arguments: keys first."""
    groups: dict[str, list[str]] = {}
    for kind in (ByRecipe, Refused):
        for name, entry in arguments.items():
            if isinstance(entry, kind):
                groups.setdefault(_instead(entry), []).append(name)
    yield from groups.items()


def _instead(entry: ByRecipe | Refused) -> str:
    if isinstance(entry, ByRecipe):
        return code(entry.key)
    repair = entry.repair.removeprefix("remove it").removeprefix("; ")
    return f"none: {entry.reason}" + (f"; {repair}" if repair else "")


def _effect(entry: Passed) -> str:
    ignored = f"; without effect, and refused, with {', '.join(entry.ignored_by)}" if entry.ignored_by else ""
    return f"{entry.effect}{ignored}"


def _engines(class_names: list[str]) -> str:
    if "TrainingArguments" in class_names:
        return "every engine"
    return "`trl`: " + ", ".join(class_names)
