"""Compatibility solver: evaluates the rules of ``compatibility`` before anything is loaded.

Quantization x adapter x strategy x offload x stage x engine x optimizer x hardware: ``check`` returns whether
a combination works, works with changed values, or cannot work; ``resolve`` applies the changes to values that
nobody set and refuses the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finetune.planning.compatibility import RULES, Fact, Rule
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import DEFAULT, Recipe
from finetune.recipe.settings import AdapterSettings

Kind = Literal["works", "changed", "cannot"]
SOLVER = "solver"
"""The origin of a value that was changed here."""

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
"""The order in which ``auto`` tries them: those that shard more communicate more."""
QUANTIZATIONS = ("none", "nf4", "int8")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "adafactor")
OFFLOADS = ("none", "cpu", "nvme")

KEYS = {
    "adapter": "adapter.method",
    "quantization": "model.quantization",
    "precision": "model.precision",
    "strategy": "train.strategy",
    "processes": "train.processes",
    "offload": "train.offload",
    "engine": "train.engine",
    "optimizer": "train.optimizer",
    "two_passes": "adapter.consistency",
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
    device: str = "cpu"
    bfloat16: bool = True

    def facts(self) -> dict[str, Fact]:
        """Return the properties that rules match on: settings, and the adapter's traits."""
        traits = adapter_traits(self.adapter)
        stored = traits.quantization[0] if self.quantization == "auto" else self.quantization
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "quantization": stored,
            "processes": "one" if self.processes == 1 else "several",
            "adapter_takes_it": stored in traits.quantization,
            "adapter_has_engine": self.engine in traits.engines,
            "adapter_scores": not traits.scores,
            "changes_base": traits.changes_base,
            "whole_model": traits.whole_model,
        }

    def changed(self, changes: Mapping[str, Any]) -> "Combination":
        """Return the combination with other values of recipe keys."""
        names = {key: name for name, key in KEYS.items()}
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

    kind: Kind
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    repair: str = ""
    rules: tuple[Rule, ...] = ()

    def says(self) -> str:
        """Return the verdict as one line."""
        if self.kind == "works":
            return "works"
        if self.kind == "cannot":
            return f"incompatible: {self.reason}"
        return f"works with {settings_text(self.changes)}: {self.reason}"


WORKS = Verdict("works")


def judge(combination: Combination) -> Verdict:
    """Return whether a combination works, or with which other values it would.

    The first rule that applies changes the combination, which is checked again, since a change may need
    another one. A rule without changes, or changes that lead back to a combination seen before, make it
    incompatible.
    """
    hit: list[Rule] = []
    changes: dict[str, Any] = {}
    seen = {combination}
    while (rule := first_hit(combination)) is not None:
        hit.append(rule)
        changes |= rule.changes
        combination = combination.changed(rule.changes)
        if combination in seen:  # a rule without changes, or two rules that undo each other
            return Verdict("cannot", {}, _reasons(hit), hit[-1].repair or hit[0].repair, tuple(hit))
        seen.add(combination)
    if not hit:
        return WORKS
    # A rule's repair text describes its change alone; a chain of changes is listed as overrides.
    alone = hit[0].repair if len(hit) == 1 else ""
    return Verdict("changed", changes, _reasons(hit), alone or settings_text(changes), tuple(hit))


def first_hit(combination: Combination) -> Rule | None:
    """Return the first rule that applies to a combination."""
    facts = combination.facts()
    return next((rule for rule in RULES if rule.hits(facts)), None)


def strategy(combination: Combination) -> str:
    """Return the meaning of ``train.strategy: auto``: the first strategy that works without changes.

    Args:
        combination: its own strategy is ignored.
    """
    if combination.processes == 1:
        return STRATEGIES[0]
    each = (replace(combination, strategy=name) for name in STRATEGIES[1:])
    # Where none works as it is, ddp is checked, and the user reads why it does not.
    return next((one.strategy for one in each if first_hit(one) is None), STRATEGIES[1])


def settings_text(changes: Mapping[str, Any]) -> str:
    """Return settings as command-line overrides."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def _reasons(rules: list[Rule]) -> str:
    return "; then ".join(dict.fromkeys(rule.reason for rule in rules))


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run is launched: the device, its bfloat16 support, the number of processes."""

    device: str
    bfloat16: bool
    processes: int


def settled(recipe: Recipe, machine: Machine) -> Recipe:
    """Return the recipe with compatible settings; each change has a note and the origin `solver`.

    Values that nobody set are changed where that helps; ``train.strategy: auto`` becomes the first strategy
    that works. Values that the recipe or the user set are never changed.

    Raises:
        UserError: the settings are incompatible.
    """
    combination = combination_of(recipe, machine)
    if recipe.settings.train.strategy == "auto":
        combination = replace(combination, strategy=strategy(combination))
    verdict = judge(combination)
    free = {key for key in KEYS.values() if _free(recipe, key)}
    if verdict.kind == "cannot" or not verdict.changes.keys() <= free:
        raise UserError(problem(combination, verdict).placed(recipe.origins))
    # A note only where auto chose another strategy than the plain one, with the reason against that.
    plain = STRATEGIES[combination.processes > 1]
    if combination.strategy != plain and recipe.settings.train.strategy == "auto":
        why = judge(replace(combination, strategy=plain)).reason
        recipe = _with(recipe, {"train.strategy": combination.strategy}, why)
    return _with(recipe, verdict.changes, verdict.reason) if verdict.changes else recipe


def combination_of(recipe: Recipe, machine: Machine) -> Combination:
    """Return the combination of a recipe on a launch target."""
    settings = recipe.settings
    return Combination(
        stage=recipe.stage,
        adapter=settings.adapter.method,
        quantization=settings.model.quantization,
        precision=settings.model.precision,
        strategy=settings.train.strategy,
        processes=machine.processes,
        offload=settings.train.offload,
        engine=settings.train.engine,
        optimizer=settings.train.optimizer,
        two_passes=wants_two_passes(settings.adapter),
        device=machine.device,
        bfloat16=machine.bfloat16,
    )


def wants_two_passes(adapter: AdapterSettings) -> bool:
    """Return whether an adapter's settings need two forward passes per batch."""
    return bool(adapter.model_dump().get("consistency", False))


def problem(combination: Combination, verdict: Verdict) -> Problem:
    """Return a verdict as the user's error message."""
    rule = verdict.rules[0]
    # The error is reported at the rule's first property that is a recipe key.
    where = next((name for name in rule.when if name in KEYS), "adapter")
    others = dict.fromkeys(_told(name, combination) for name in rule.when if name != where)
    found = f"{str(combination.facts()[where]).lower()}, with {', '.join(others)}"
    return Problem(KEYS[where], found, f"compatible settings: {verdict.reason}", verdict.repair)


def _told(name: str, combination: Combination) -> str:
    """Return a property of a combination as recipe text."""
    if name == "device":
        return "the CPU" if combination.device == "cpu" else "a GPU"
    if name == "processes":
        count = combination.processes
        return f"{count} process{'es' if count > 1 else ''}"
    if name == "stage":
        return f"stage {combination.stage}"
    if name in KEYS:
        return f"{KEYS[name]}={str(combination.facts()[name]).lower()}"
    return {
        "adapter_takes_it": f"model.quantization={combination.quantization}",
        "adapter_has_engine": f"train.engine={combination.engine}",
        "bfloat16": "no native bfloat16",
    }.get(name, f"adapter.method={combination.adapter}")


def _free(recipe: Recipe, key: str) -> bool:
    """Return whether nobody set a value, so that the solver may change it."""
    section, name = key.split(".")
    value = recipe.settings.model_dump()[section].get(name)
    # The solver's own changes may change again, so that resolving a resolved recipe is a no-op.
    return value == "auto" or recipe.origins.get(key, DEFAULT) in (DEFAULT, SOLVER)


def _with(recipe: Recipe, changes: Mapping[str, Any], reason: str) -> Recipe:
    settings = recipe.settings
    for key, value in changes.items():
        section, name = key.split(".")
        changed = dict(settings)[section].model_copy(update={name: value})
        settings = settings.model_copy(update={section: changed})
    origins = recipe.origins | dict.fromkeys(changes, SOLVER)
    note = f"{settings_text(changes)}: {reason}"
    return replace(recipe, settings=settings, origins=origins, notes=[*recipe.notes, note])
