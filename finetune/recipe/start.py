"""What a stage goes on from: an earlier run, and the values that a recipe must leave to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.checks import adapter_traits
from finetune.recipe.command_line import COMMAND_LINE, Origins, Values, learning_rate_note
from finetune.recipe.discovery import ADAPTERS, load_plugin, load_stage, stage_names
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import ALL_RUNS, find_run, finished_record
from finetune.recipe.settings import AdapterSettings, DataSettings, ModelSettings, StageSettings

SCORERS = ("reward",)
"""Stages whose runs hold a model that gives scores and writes no text: no other stage goes on from them."""

OF_THE_RUN = ("base", "revision", "trust_remote_code", "quantization", "rope")
UNLESS_GIVEN = ("precision", "attention")
"""How the weights are computed with is the run's way too, unless the recipe or the user says otherwise."""


@dataclass(frozen=True)
class Start:
    """A finished run, or the recipe of a run that is still to be made, and what is taken from it.

    Attributes:
        name: what ``model.start`` becomes: a run's folder, or ``stage/recipe``.
        model: its base.
        adapter: the settings of its adapter; None where it tuned the whole model.
        template: how it wrote conversations, ``data.template`` and ``data.system``; empty if it read texts.
        notes: what the user should know about it.
    """

    name: str
    model: ModelSettings
    adapter: AdapterSettings | None
    template: dict[str, str | None]
    notes: list[str]

    @property
    def origin(self) -> str:
        """Return what ``show`` says of the values that come from it."""
        return f"run {Path(self.name).name if Path(self.name).is_dir() else self.name}"


def is_recipe(text: str) -> bool:
    """Tell whether a start is ``stage/recipe`` and no folder."""
    stage, slash, name = text.partition("/")
    return bool(slash and name) and stage in stage_names() and not Path(text).is_dir()


def start_of_run(text: str, *, stage: str) -> Start:
    """Return a finished run as the start of a stage.

    Raises:
        UserError: there is no such run, it is not finished, it holds nothing that this stage can train, or
            its files are not there any more.
    """
    run, note = find_run(text)
    record = finished_record(run)
    _refuse_scorer(str(run), record["stage"], stage=stage)
    refuse_lost_files(run, record, where="model.start")
    load, name = record["load"], _shown(run)
    method = yaml_file.read(run / "recipe.yaml")[0]["adapter"]
    notes = [note] if note else []
    model = ModelSettings(**{**load["model"], "start": None})
    if (run / "model").is_dir():
        model = model.model_copy(update={"base": name, "revision": None, "rope": None})
    return _start(name, model, _adapter(method), template=_template(record["stage"], load), notes=notes)


def start_of_recipe(text: str, first: str, settings: StageSettings, *, stage: str) -> Start:
    """Return the run that a recipe of stage ``first`` will make as the start of ``stage``.

    Raises:
        UserError: that stage's model writes no text.
    """
    _refuse_scorer(text, first, stage=stage)
    data = settings.data.model_dump(include={"template", "system"})
    model = settings.model.model_copy(update={"start": None})
    return _start(text, model, settings.adapter, template=_template(first, data), notes=[])


def lay_over(values: Values, origins: Origins, start: Start) -> tuple[list[str], list[Problem]]:
    """Put what belongs to the start into a recipe's values.

    What the recipe's file says of it gives way; what the user says of it must be the same.

    Returns:
        Notes on what gave way, and the user's contradictions.
    """
    taken = _taken(start, values)
    problems = list(_contradictions(values, origins, start=start, taken=taken))
    before = values.get("adapter", {}).get("method", AdapterSettings().method)
    notes = [*start.notes, *_other_template(values, origins, start=start)]
    gave_way = [
        note for section in taken for note in _lay(section, values, origins, start=start, taken=taken)
    ]
    if gave_way:
        notes.append(f"{start.origin} has its own in place of the recipe's {', '.join(gave_way)}")
    return notes + learning_rate_note(values, origins, before=before), problems


def _start(
    name: str,
    model: ModelSettings,
    adapter: AdapterSettings,
    *,
    template: dict[str, str | None],
    notes: list[str],
) -> Start:
    traits = adapter_traits(adapter.method)
    if traits.whole_model:
        return Start(name, model, None, template, notes)
    if model.quantization == "auto":
        model = model.model_copy(update={"quantization": traits.quantization[0]})
    if traits.goes_on_as:
        notes = [
            *notes,
            f"adapter '{adapter.method}' goes on as '{traits.goes_on_as}': that is what it saved",
        ]
    return Start(name, model, going_on(adapter), template, notes)


def going_on(adapter: AdapterSettings) -> AdapterSettings:
    """Return the settings of what trains on where an adapter has ended: its own but for how it begins."""
    traits = adapter_traits(adapter.method)
    kept = adapter.model_dump(exclude={"method", *traits.at_start})
    return _schema(traits.goes_on_as or adapter.method)(**kept)


def _adapter(content: dict[str, Any]) -> AdapterSettings:
    return _schema(content["method"]).model_validate(content)


def _schema(method: str) -> type[AdapterSettings]:
    schema: type[AdapterSettings] = load_plugin(ADAPTERS, method, where="adapter.method").Settings
    return schema


def _template(stage: str, load: dict[str, Any]) -> dict[str, str | None]:
    """Return how a run wrote conversations; a stage that reads texts says so only if it was asked to."""
    data: DataSettings = load_stage(stage).Settings().data
    if data.texts is not None and load["template"] == data.template:
        return {}
    return {"template": load["template"], "system": load["system"]}


def _refuse_scorer(run: str, first: str, *, stage: str) -> None:
    """Raise UserError if a run's model gives scores and the stage needs one that writes text."""
    if first in SCORERS and first != stage:
        found = f"'{run}' is of stage {first}: its model gives scores and writes no text"
        expected = "a run that writes text, such as one of stage sft"
        raise UserError(Problem("model.start", found, expected, ALL_RUNS))


def refuse_lost_files(run: Path, record: dict[str, Any], *, where: str) -> None:
    """Raise UserError if what a run has saved is not there any more."""
    lost = [name for name in record.get("files", {}) if not (run / name).is_file()]
    if lost or not record.get("files"):
        found = f"'{run}' has lost {', '.join(lost)}" if lost else f"'{run}' has saved no weights"
        repair = f"`{record['command']} --force` makes it anew"
        raise UserError(Problem(where, found, "the weights that a run saves", repair))


def _shown(run: Path) -> str:
    """Return a run's folder, as seen from here where it lies below."""
    whole, here = run.resolve(), Path.cwd().resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def _taken(start: Start, values: Values) -> Values:
    """Return the start's values, by section."""
    model = start.model.model_dump()
    given = values.get("model", {})
    keys = [*OF_THE_RUN, *(key for key in UNLESS_GIVEN if key not in given)]
    if start.adapter is None:
        keys.remove("quantization")  # a new adapter on what is now a base
    data = {key: value for key, value in start.template.items() if key not in values.get("data", {})}
    taken = {"model": {"start": start.name, **{key: model[key] for key in keys}}, "data": data}
    if start.adapter is not None:
        taken["adapter"] = start.adapter.model_dump()
    return taken


def _lay(section: str, values: Values, origins: Origins, *, start: Start, taken: Values) -> list[str]:
    """Lay the start's values over a section; return the recipe's values that were others."""
    mine, theirs = values.setdefault(section, {}), taken[section]
    foreign = mine.get("method", theirs.get("method")) != theirs.get("method")
    gave_way = []
    for key in list(mine):
        dotted = f"{section}.{key}"
        belongs = section == "adapter" or key in theirs
        if dotted == "model.start" or not belongs:
            continue
        if origins[dotted] == COMMAND_LINE:
            if foreign and key not in theirs:
                del mine[key]  # it speaks of the adapter that is refused
            continue
        value, origin = mine.pop(key), origins.pop(dotted)
        if key not in theirs or not _same(dotted, value, theirs[key]):
            gave_way.append(f"{dotted}={yaml_file.shown(value)} ({origin})")
    for key, value in theirs.items():
        dotted = f"{section}.{key}"
        if origins.get(dotted) != COMMAND_LINE or dotted == "model.start" or dotted not in _free(taken):
            mine[key] = value
            origins.setdefault(dotted, start.origin)
    return gave_way


def _free(taken: Values) -> set[str]:
    """Return the settings of a start, by ``section.key``, that the user may change."""
    adapter = taken.get("adapter")
    free = adapter_traits(adapter["method"]).in_training if adapter else ()
    return {"model.start", "model.trust_remote_code", *(f"adapter.{key}" for key in free)}


def _contradictions(values: Values, origins: Origins, *, start: Start, taken: Values) -> Iterator[Problem]:
    """Yield what the user asks for that the start cannot become."""
    fixed = {
        f"{section}.{key}": value for section, content in taken.items() for key, value in content.items()
    }
    for dotted, theirs in fixed.items():
        section, key = dotted.split(".")
        if origins.get(dotted) != COMMAND_LINE or dotted in _free(taken):
            continue
        mine = values[section][key]
        if _same(dotted, mine, theirs):
            continue
        found = f"{yaml_file.shown(mine)}, but {start.origin} has {yaml_file.shown(theirs)}"
        yield Problem(dotted, found, "that of the run, which goes on with its own", _apart(start))
        if key in ("base", "method"):
            return


def _apart(start: Start) -> str:
    """Return how to get what a start cannot become."""
    if start.adapter is None:
        return "leave out one of the two"
    if not Path(start.name).is_dir():
        return "leave it out; or model.start=null: a new adapter on the base, and no start"
    run = start.name
    return f"leave it out; or `llm-align merge {run}`, then --base {run} in place of --from"


def _same(dotted: str, one: Any, other: Any) -> bool:
    if dotted != "model.base" or one == other or not isinstance(one, str):
        return bool(one == other)
    try:
        return resolve_base(one) == resolve_base(other)
    except UserError:
        return False


def _other_template(values: Values, origins: Origins, *, start: Start) -> list[str]:
    """Return a note on a recipe's template that is not the one that the start has learnt."""
    template, learnt = values.get("data", {}).get("template"), start.template.get("template")
    origin = origins.get("data.template", "")
    if learnt is None or template in (None, learnt) or origin == COMMAND_LINE:
        return []
    return [f"data.template={template} ({origin}); {start.origin} learnt data.template={learnt}"]
