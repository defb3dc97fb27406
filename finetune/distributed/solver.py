"""Compatibility solver: evaluates the compatibility rules before anything is loaded.

Quantization x adapter x strategy x offload x stage x engine x optimizer x hardware: ``check`` returns whether
a combination works, works with changed values, or cannot work; ``resolve`` applies the changes to values that
nobody set and refuses the others.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from finetune.distributed import strategies
from finetune.distributed.strategies import STRATEGIES
from finetune.recipe.base_config import load_stored_quantization
from finetune.recipe.compatibility import Rule, union
from finetune.recipe.discovery import ADAPTERS, adapter_traits, plugin_names, stage_names
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import DEFAULT_ORIGIN, Recipe
from finetune.recipe.rules import RULES, adapter_properties, adapter_rules, rules_of, stage_rules
from finetune.recipe.settings import AdapterSettings, StageSettings

VerdictKind = Literal["works", "changed", "incompatible"]
SOLVER_ORIGIN = "solver"
"""The origin of a value that was changed here."""

OPTIMIZER_NAMES = ("adamw", "adamw_8bit", "paged_adamw", "adafactor")
OFFLOADS = ("none", "cpu", "nvme")

RECIPE_KEYS = {
    "adapter": "adapter.method",
    "quantization": "model.quantization",
    "precision": "model.precision",
    "strategy": "train.strategy",
    "offload": "train.offload",
    "engine": "train.engine",
    "optimizer": "train.optimizer",
    "two_passes": "adapter.consistency",
    "tf32": "train.engine_args.tf32",
}
"""Recipe keys of a combination's properties; stage and hardware are not set by the recipe."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Settings that must be compatible, and the device they run on.

    Attributes:
        stage: the stage.
        adapter: the adapter's method.
        quantization: storage format of the frozen base; ``auto``: the adapter's default.
        precision: dtype of the forward pass; ``auto``: the hardware's.
        strategy: distributed strategy.
        processes: their number.
        offload: where ZeRO stores optimizer states and weights.
        engine: native or trl.
        optimizer: its name.
        two_passes: whether the adapter needs two forward passes per batch (AdaMix).
        tf32: whether float32 products are computed in TF32.
        device: ``cpu`` or ``cuda``.
        bfloat16: whether the device supports bfloat16 natively.
    """

    stage: str = "sft"
    adapter: str = "lora"
    quantization: str = "auto"
    precision: str = "auto"
    strategy: str = "single"
    processes: int = 1
    offload: str = "none"
    engine: str = "native"
    optimizer: str = "adamw"
    two_passes: bool = False
    tf32: bool = False
    device: str = "cpu"
    bfloat16: bool = True

    def properties(self) -> dict[str, Any]:
        """Return the properties that rules match on: settings, the adapter's traits, and the device."""
        return {
            **{RECIPE_KEYS.get(name, name): getattr(self, name) for name in self.__slots__},
            "processes": "one" if self.processes == 1 else "several",
            **adapter_properties(self.adapter, quantization=self.quantization, engine=self.engine),
        }

    def with_changes(self, changes: Mapping[str, Any]) -> "Combination":
        """Return the combination with other values of recipe keys."""
        names = {key: name for name, key in RECIPE_KEYS.items()}
        return replace(self, **{names[key]: value for key, value in changes.items()})


@dataclass(frozen=True, slots=True)
class Verdict:
    """The solver's result for a combination.

    Attributes:
        kind: works, changed (works with other values), or incompatible.
        changes: recipe key -> the value with which it works.
        reason: why it does not work as it is.
        repair: what the user can do.
        rules: the rules that applied, in order.
    """

    kind: VerdictKind
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    repair: str = ""
    rules: tuple[Rule, ...] = ()

    def describe(self) -> str:
        """Return the verdict as one line."""
        if self.kind == "works":
            return "works"
        if self.kind == "incompatible":
            return f"incompatible: {self.reason}"
        return f"works with {format_overrides(self.changes)}: {self.reason}"


COMPATIBLE = Verdict("works")


def check(combination: Combination) -> Verdict:
    """Return whether a combination works, or with which other values it would.

    The first rule that applies changes the combination, which is checked again, since a change may need
    another one. A rule without changes, or changes that lead back to a combination seen before, make it
    incompatible.
    """
    applied: list[Rule] = []
    changes: dict[str, Any] = {}
    seen = {combination}
    while (rule := first_applicable_rule(combination)) is not None:
        applied.append(rule)
        changes |= rule.changes
        combination = combination.with_changes(rule.changes)
        if combination in seen:  # a rule without changes, or two rules that undo each other
            return Verdict(
                "incompatible",
                {},
                _join_reasons(applied),
                applied[-1].repair or applied[0].repair,
                tuple(applied),
            )
        seen.add(combination)
    if not applied:
        return COMPATIBLE
    # A rule's repair text describes its change alone; a chain of changes is listed as overrides.
    only_repair = applied[0].repair if len(applied) == 1 else ""
    return Verdict(
        "changed", changes, _join_reasons(applied), only_repair or format_overrides(changes), tuple(applied)
    )


def first_applicable_rule(combination: Combination) -> Rule | None:
    """Return the first rule that applies to a combination."""
    properties = combination.properties()
    rules = _launch_rules(combination.stage, combination.adapter)
    # Without checks that need code: those are of the recipe alone.
    return next((rule for rule in rules if rule.find is None and rule.applies(properties)), None)


@cache
def _launch_rules(stage: str, adapter: str) -> tuple[Rule, ...]:
    return _in_order((*rules_of(stage, adapter), *strategies.RULES))


def _in_order(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return rules in the order in which the solver takes the first that applies.

    Those on sharding are last: a stage's before those of all, and after what a number of processes or an
    offload excludes.
    """
    return tuple(sorted(rules, key=_is_on_sharding))


def _is_on_sharding(rule: Rule) -> bool:
    return "train.strategy" in rule.when and not {"processes", "train.offload"} & rule.when.keys()


def collected_rules() -> tuple[Rule, ...]:
    """Return every rule: of all recipes, adapters, stages, and of the launch; a shared one once."""
    rules: dict[str, Rule] = {}
    of_adapters = [rule for name in plugin_names(ADAPTERS) for rule in adapter_rules(name)]
    of_stages = [rule for name in stage_names() for rule in stage_rules(name)]
    for rule in (*RULES, *of_adapters, *of_stages, *strategies.RULES):
        earlier = rules.get(rule.name)
        rules[rule.name] = rule if earlier is None else union(earlier, rule)
    return _in_order(rules.values())


def solver_rules() -> tuple[Rule, ...]:
    """Return the rules on quantization, adapter, strategy, offload, stage, engine, optimizer and hardware."""
    known = Combination().properties().keys()
    return tuple(rule for rule in collected_rules() if rule.find is None and rule.when.keys() <= known)


def resolve_auto_strategy(combination: Combination) -> str:
    """Return the meaning of ``train.strategy: auto``: the first strategy that works without changes.

    Args:
        combination: its own strategy is ignored.
    """
    if combination.processes == 1:
        return STRATEGIES[0]
    candidates = (replace(combination, strategy=name) for name in STRATEGIES[1:])
    # Where none works as it is, ddp is checked, and the user reads why it does not.
    return next(
        (candidate.strategy for candidate in candidates if first_applicable_rule(candidate) is None),
        STRATEGIES[1],
    )


def format_overrides(changes: Mapping[str, Any]) -> str:
    """Return settings as command-line overrides."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def _join_reasons(rules: list[Rule]) -> str:
    return "; then ".join(dict.fromkeys(rule.describe() for rule in rules))


@dataclass(frozen=True, slots=True)
class LaunchTarget:
    """Where a run is launched: the device, its bfloat16 support, the number of processes."""

    device: str
    bfloat16: bool
    processes: int


def resolve(recipe: Recipe, target: LaunchTarget) -> Recipe:
    """Return the recipe with compatible settings; each change has a note and the origin `solver`.

    Values that nobody set are changed where that helps; ``train.strategy: auto`` becomes the first strategy
    that works. Values that the recipe or the user set are never changed.

    Raises:
        UserError: the settings are incompatible.
    """
    combination = recipe_combination(recipe, target)
    if recipe.settings.train.strategy == "auto":
        combination = replace(combination, strategy=resolve_auto_strategy(combination))
    verdict = check(combination)
    unset_keys = {key for key in RECIPE_KEYS.values() if _is_unset(recipe, key)}
    if verdict.kind == "incompatible" or not verdict.changes.keys() <= unset_keys:
        raise UserError(incompatibility_problem(combination, verdict).with_origin(recipe.origins))
    # A note only where auto chose another strategy than the plain one, with the reason against that.
    plain_strategy = STRATEGIES[combination.processes > 1]
    if combination.strategy != plain_strategy and recipe.settings.train.strategy == "auto":
        reason = check(replace(combination, strategy=plain_strategy)).reason
        recipe = _apply_changes(recipe, {"train.strategy": combination.strategy}, reason)
    return _apply_changes(recipe, verdict.changes, verdict.reason) if verdict.changes else recipe


def refuse_incompatible(recipe: Recipe, target: LaunchTarget) -> None:
    """Raise UserError if a recipe cannot run here as it is: the last check, on the device of the run itself.

    ``resolve`` has changed what can be changed before the launch; a stage may also be called without it.
    """
    combination = recipe_combination(recipe, target)
    verdict = check(combination)
    if verdict.kind != "works":
        raise UserError(incompatibility_problem(combination, verdict).with_origin(recipe.origins))


def recipe_combination(recipe: Recipe, target: LaunchTarget) -> Combination:
    """Return the combination of a recipe on a launch target."""
    settings = recipe.settings
    return Combination(
        stage=recipe.stage,
        adapter=settings.adapter.method,
        quantization=_stored_or_requested(settings),
        precision=settings.model.precision,
        strategy=settings.train.strategy,
        processes=target.processes,
        offload=settings.train.offload,
        engine=settings.train.engine,
        optimizer=settings.train.optimizer,
        two_passes=needs_two_passes(settings.adapter),
        tf32=settings.train.engine_args.get("tf32") is True,
        device=target.device,
        bfloat16=target.bfloat16,
    )


def _stored_or_requested(settings: StageSettings) -> str:
    """Return the base's quantization: what its own files have, or the recipe's value.

    Raises:
        UserError: the recipe cannot train on the base as it is stored.
    """
    model = settings.model
    stored = load_stored_quantization(model.base, model.revision)
    # Formats that no setting names are refused where the base is planned.
    if stored is None or not stored.quantization:
        return model.quantization
    stored.check(model.quantization, adapter_traits(settings.adapter.method).quantization)
    return stored.quantization


def needs_two_passes(adapter: AdapterSettings) -> bool:
    """Return whether an adapter's settings need two forward passes per batch."""
    return bool(adapter.model_dump().get("consistency", False))


def incompatibility_problem(combination: Combination, verdict: Verdict) -> Problem:
    """Return a verdict as the user's error message."""
    rule = verdict.rules[0]
    # The error is reported at the rule's first property that is a recipe key.
    key = next((name for name in rule.when if name in RECIPE_KEYS.values()), "adapter.method")
    other_properties = dict.fromkeys(_format_property(name, combination) for name in rule.when if name != key)
    actual = f"{_plain(combination.properties()[key])}, with {', '.join(other_properties)}"
    return Problem(key, actual, f"compatible settings: {verdict.reason}", verdict.repair)


def _format_property(name: str, combination: Combination) -> str:
    """Return a property of a combination as recipe text."""
    if name == "device":
        return "the CPU" if combination.device == "cpu" else "a GPU"
    if name == "processes":
        count = combination.processes
        return f"{count} process{'es' if count > 1 else ''}"
    if name == "stage":
        return f"stage {combination.stage}"
    if name in RECIPE_KEYS.values():
        return f"{name}={_plain(combination.properties()[name])}"
    return {
        "quantization_supported": f"model.quantization={combination.quantization}",
        "engine_supported": f"train.engine={combination.engine}",
        "bfloat16": "no native bfloat16",
    }.get(name, f"adapter.method={combination.adapter}")


def _plain(value: Any) -> str:
    return str(value).lower()


def _is_unset(recipe: Recipe, key: str) -> bool:
    """Return whether nobody set a value, so that the solver may change it."""
    section, name = key.split(".", 1)
    value = recipe.settings.model_dump()[section].get(name)
    # The solver's own changes may change again, so that resolving a resolved recipe is a no-op.
    return value == "auto" or recipe.origins.get(key, DEFAULT_ORIGIN) in (DEFAULT_ORIGIN, SOLVER_ORIGIN)


def _apply_changes(recipe: Recipe, changes: Mapping[str, Any], reason: str) -> Recipe:
    settings = recipe.settings
    for key, value in changes.items():
        section, name = key.split(".")
        section_settings = dict(settings)[section].model_copy(update={name: value})
        settings = settings.model_copy(update={section: section_settings})
    origins = recipe.origins | dict.fromkeys(changes, SOLVER_ORIGIN)
    note = f"{format_overrides(changes)}: {reason}"
    return replace(recipe, settings=settings, origins=origins, notes=[*recipe.notes, note])
