"""Compatibility rules: which settings cannot be combined, why, and the source of each claim.

Everything that no rule excludes works. A rule is written once, in ``RULES`` of the file that it is about: a
stage (``stages/*.py``), an adapter (``finetune/adapters/*.py``), ``finetune.distributed.strategies``, or
``finetune.recipe.rules`` if it holds for all. Recipe loading, ``llm-align plan --compatibility``, the launch
of a run and the documentation evaluate the same rules.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Literal

from finetune.recipe.errors import Problem, UserError

Properties = Mapping[str, Any]
"""Settings by recipe key (``train.engine``), the adapter's traits (``traits.packing``), ``stage``, and where
a run is launched: ``device``, ``bfloat16``, ``processes``. A property that is not known yet is missing."""

Condition = tuple[Any, ...] | Callable[[Any], bool]
"""The values of a property for which a rule applies: listed, or those that a predicate accepts."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A combination of settings that does not work, or a check of some sections.

    Attributes:
        name: its label in tables.
        when: property -> the values for which this applies; all of them must match. A rule with a property
            that is not known, because its section is invalid or the hardware is not chosen, does not apply.
        message: why it does not work, or what is checked: a line of docs/reference/compatibility.md.
        repair: a repair that ``changes`` cannot express.
        source: reference for the claim.
        evidence: how the claim was established: *run* (tested here, on the versions in constraints.txt),
            *source* (read in the library's code), *ours* (our own design).
        changes: recipe key -> a value that works; the solver sets it where nobody set another.
        problem: the error when a recipe is loaded; its texts are format strings over the properties. None:
            evaluated when a run is launched.
        find: a check that needs code: settings -> problems.
        reads: the sections that ``find`` reads; it does not run if one of them is invalid.
    """

    name: str
    when: Mapping[str, Condition] = field(default_factory=dict)
    message: str = ""
    repair: str = ""
    source: str = field(kw_only=True)
    evidence: Literal["run", "source", "ours"] = "ours"
    changes: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    find: Callable[[Any], Iterable[Problem]] | None = None
    reads: tuple[str, ...] = ()

    def applies(self, properties: Properties) -> bool:
        """Return whether the rule applies to settings with these properties."""
        return all(
            name in properties and _matches(condition, properties[name])
            for name, condition in self.when.items()
        )

    def describe(self) -> str:
        """Return why the combination does not work: the text of tables."""
        return self.message or (f"{self.problem.where} is {self.problem.expected}" if self.problem else "")


def is_set(value: Any) -> bool:
    """Return whether a setting is not null."""
    return value is not None


def problems_of(
    rules: Iterable[Rule], settings: Any, properties: Properties, valid: Collection[str]
) -> list[Problem]:
    """Return the problems that a recipe's rules find when it is loaded, in the rules' order.

    Args:
        rules: those of its stage and its adapter.
        settings: its sections.
        properties: what is known of it; those of an invalid section are missing.
        valid: the names of the valid sections.
    """
    problems: list[Problem] = []
    for rule in rules:
        if rule.applies(properties) and set(rule.reads) <= set(valid):
            problems += _problems_of_rule(rule, settings, properties)
    return problems


def within(rule: Rule, name: str, value: str) -> Rule:
    """Return a rule that holds for one value of a property alone: a stage's, an adapter's."""
    return replace(rule, when={name: (value,), **rule.when})


def union(first: Rule, second: Rule) -> Rule:
    """Return one rule of two that differ in the values of a property alone: a rule that stages share."""
    values: dict[str, Condition] = {}
    for name, condition in first.when.items():
        other = second.when[name]
        if isinstance(condition, tuple) and isinstance(other, tuple):
            condition = tuple(dict.fromkeys((*condition, *other)))
        values[name] = condition
    return replace(first, when=values)


def caught(check: Callable[..., Any], *arguments: Any, **options: Any) -> list[Problem]:
    """Return the problems of the UserError that a call raises, if it raises one."""
    try:
        check(*arguments, **options)
    except UserError as error:
        return error.problems
    return []


def _problems_of_rule(rule: Rule, settings: Any, properties: Properties) -> Iterable[Problem]:
    if rule.find is not None:
        return rule.find(settings)
    if rule.problem is None:
        return ()
    problem = rule.problem
    texts = (problem.where, problem.actual, problem.expected, problem.repair)
    return [Problem(*(_TEXTS.vformat(text, (), properties) for text in texts))]


def _matches(condition: Condition, value: Any) -> bool:
    return value in condition if isinstance(condition, tuple) else condition(value)


class _PropertyFormatter(Formatter):
    """Formats ``{train.batch_size}`` with the property of this name, and a list's length (``:count``)."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name  # a dot in a name is no attribute

    def format_field(self, value: Any, format_spec: str) -> str:
        return str(len(value)) if format_spec == "count" else str(super().format_field(value, format_spec))


_TEXTS = _PropertyFormatter()
