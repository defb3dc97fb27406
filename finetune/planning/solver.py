"""Do these settings go together? Told before anything is loaded, from the facts in ``compatibility``.

Quantization x adapter x strategy x offload x stage x engine x optimizer x hardware: ``judge`` says of a
combination that it works, that it works when changed so, or that it cannot and why; ``settled`` makes the
changes that contradict nobody's wish and refuses the others.
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
"""In this order ``auto`` looks for one that works: the more a process holds a part of, the more it sends."""
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
"""The recipe's names of what a combination is made of; stage and hardware are not the recipe's to say."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Settings that have to go together, and what they run on.

    Attributes:
        stage: what runs.
        adapter: what is trained.
        quantization: how the frozen base is stored; ``auto``: as the adapter asks.
        precision: type of the forward pass; ``auto``: as the hardware computes.
        strategy: what each process holds a part of.
        processes: how many share the work.
        offload: where ZeRO keeps what is not in use.
        engine: whose trainer it is.
        optimizer: its optimizer.
        two_passes: whether the adapter wants each batch twice (AdaMix).
        device: ``cpu`` or ``cuda``.
        bfloat16: whether the device computes in bfloat16.
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
        """Return what rules are about, by name: settings, and what the adapter declares of itself."""
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
        """Return the combination with other values of the recipe's keys."""
        names = {key: name for name, key in KEYS.items()}
        return replace(self, **{names[key]: value for key, value in changes.items()})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a combination.

    Attributes:
        kind: works, works when changed, or cannot.
        changes: recipe key -> the value with which it works.
        reason: why it is changed or cannot be.
        repair: what the user can do.
        rules: the rules that were hit, in order.
    """

    kind: Kind
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    repair: str = ""
    rules: tuple[Rule, ...] = ()

    def says(self) -> str:
        """Return it in a line."""
        if self.kind == "works":
            return "works"
        if self.kind == "cannot":
            return f"cannot: {self.reason}"
        return f"works with {settings_text(self.changes)}: {self.reason}"


WORKS = Verdict("works")


def judge(combination: Combination) -> Verdict:
    """Return whether settings go together, and with which other values they would.

    The first rule that is hit is applied, and what it makes of the combination is judged again: a change may
    need another one. Where nothing is changed, or a change is taken back, it cannot be.
    """
    hit: list[Rule] = []
    changes: dict[str, Any] = {}
    seen = {combination}
    while (rule := first_hit(combination)) is not None:
        hit.append(rule)
        changes |= rule.changes
        combination = combination.changed(rule.changes)
        if combination in seen:
            return Verdict("cannot", {}, _reasons(hit), hit[-1].repair or hit[0].repair, tuple(hit))
        seen.add(combination)
    if not hit:
        return WORKS
    alone = hit[0].repair if len(hit) == 1 else ""
    return Verdict("changed", changes, _reasons(hit), alone or settings_text(changes), tuple(hit))


def first_hit(combination: Combination) -> Rule | None:
    """Return the first rule that a combination breaks."""
    facts = combination.facts()
    return next((rule for rule in RULES if rule.hits(facts)), None)


def strategy(combination: Combination) -> str:
    """Return what ``train.strategy: auto`` means: the first strategy that works as it is.

    Args:
        combination: its strategy is not looked at.
    """
    if combination.processes == 1:
        return STRATEGIES[0]
    each = (replace(combination, strategy=name) for name in STRATEGIES[1:])
    return next((one.strategy for one in each if first_hit(one) is None), STRATEGIES[1])


def settings_text(changes: Mapping[str, Any]) -> str:
    """Return settings as they are typed on the command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def _reasons(rules: list[Rule]) -> str:
    return "; then ".join(dict.fromkeys(rule.reason for rule in rules))


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run is started on: the device, whether it computes in bfloat16, how many processes share it."""

    device: str
    bfloat16: bool
    processes: int


def settled(recipe: Recipe, machine: Machine) -> Recipe:
    """Return the recipe with settings that go together here; each change has a note and the origin `solver`.

    What nobody asked for is changed where that helps; ``train.strategy: auto`` becomes the first strategy
    that works. What the recipe or the user asks for is theirs to change.

    Raises:
        UserError: what is asked for does not go together.
    """
    combination = combination_of(recipe, machine)
    if recipe.settings.train.strategy == "auto":
        combination = replace(combination, strategy=strategy(combination))
    verdict = judge(combination)
    free = {key for key in KEYS.values() if _free(recipe, key)}
    if verdict.kind == "cannot" or not verdict.changes.keys() <= free:
        raise UserError(problem(combination, verdict).placed(recipe.origins))
    plain = STRATEGIES[combination.processes > 1]
    if combination.strategy != plain and recipe.settings.train.strategy == "auto":
        why = judge(replace(combination, strategy=plain)).reason
        recipe = _with(recipe, {"train.strategy": combination.strategy}, why)
    return _with(recipe, verdict.changes, verdict.reason) if verdict.changes else recipe


def combination_of(recipe: Recipe, machine: Machine) -> Combination:
    """Return what of a recipe has to go together on a machine."""
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
    """Tell whether an adapter's settings ask for each batch twice."""
    return bool(adapter.model_dump().get("consistency", False))


def problem(combination: Combination, verdict: Verdict) -> Problem:
    """Return a verdict as the message that the user reads."""
    rule = verdict.rules[0]
    where = next((name for name in rule.when if name in KEYS), "adapter")
    others = dict.fromkeys(_told(name, combination) for name in rule.when if name != where)
    found = f"{str(combination.facts()[where]).lower()}, with {', '.join(others)}"
    return Problem(KEYS[where], found, f"settings that go together: {verdict.reason}", verdict.repair)


def _told(name: str, combination: Combination) -> str:
    """Return a fact of a combination in the words of a recipe."""
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
        "bfloat16": "no bfloat16",
    }.get(name, f"adapter.method={combination.adapter}")


def _free(recipe: Recipe, key: str) -> bool:
    """Tell whether nobody has said what a setting is to be."""
    section, name = key.split(".")
    value = recipe.settings.model_dump()[section].get(name)
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
