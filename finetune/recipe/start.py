"""Parent run (``model.start``, --from): find it, and inherit its model, adapter and template settings."""

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
"""Stages whose model scores and does not generate text: only the same stage can continue from their runs."""

OF_THE_RUN = ("base", "revision", "trust_remote_code", "quantization", "rope")
UNLESS_GIVEN = ("precision", "attention")
"""Numerics of the parent run, inherited unless the recipe or the user sets them."""


@dataclass(frozen=True)
class Start:
    """The parent run: a finished run, or the recipe of a run that does not exist yet.

    Attributes:
        name: the value of ``model.start``: a run's folder, or ``stage/recipe``.
        model: the settings of its base model.
        adapter: the settings of its adapter; None after full tuning.
        template: its ``data.template`` and ``data.system``; empty if it was trained on plain text.
        notes: notes for the user.
    """

    name: str
    model: ModelSettings
    adapter: AdapterSettings | None
    template: dict[str, str | None]
    notes: list[str]

    @property
    def origin(self) -> str:
        """Return the origin that ``show`` prints for inherited values."""
        return f"run {Path(self.name).name if Path(self.name).is_dir() else self.name}"


def is_recipe(text: str) -> bool:
    """Return True if ``model.start`` is ``stage/recipe`` and not a folder."""
    stage, slash, name = text.partition("/")
    return bool(slash and name) and stage in stage_names() and not Path(text).is_dir()


def start_of_run(text: str, *, stage: str) -> Start:
    """Return a finished run as the parent of a stage's run.

    Raises:
        UserError: there is no such run, it is not finished, its model does not fit this stage, or its files
            are missing.
    """
    run, note = find_run(text)
    record = finished_record(run)
    _refuse_scorer(str(run), record["stage"], stage=stage)
    refuse_lost_files(run, record, where="model.start")
    load, name = record["load"], _shown(run)
    # The resolved recipe of the run, as its values may come from the command line.
    method = yaml_file.read(run / "recipe.yaml")[0]["adapter"]
    notes = [note] if note else []
    model = ModelSettings(**{**load["model"], "start": None})
    # After full tuning the run's own model/ is the new base, so revision and rope are already part of it.
    if (run / "model").is_dir():
        model = model.model_copy(update={"base": name, "revision": None, "rope": None})
    return _start(name, model, _adapter(method), template=_template(record["stage"], load), notes=notes)


def start_of_recipe(text: str, first: str, settings: StageSettings, *, stage: str) -> Start:
    """Return the future run of a recipe of stage ``parent_stage`` as the parent of a run of ``stage``.

    Raises:
        UserError: the model of that stage does not generate text.
    """
    _refuse_scorer(text, first, stage=stage)
    data = settings.data.model_dump(include={"template", "system"})
    model = settings.model.model_copy(update={"start": None})
    return _start(text, model, settings.adapter, template=_template(first, data), notes=[])


def lay_over(values: Values, origins: Origins, start: Start) -> tuple[list[str], list[Problem]]:
    """Put the parent run's settings into a recipe's values.

    They replace values of the recipe's file; values from the command line must be equal to them.

    Returns:
        Notes on replaced values, and problems for conflicting values of the command line.
    """
    taken = _taken(start, values)
    # Before anything is replaced: conflicts are with the values of the command line.
    problems = list(_contradictions(values, origins, start=start, taken=taken))
    before = values.get("adapter", {}).get("method", AdapterSettings().method)
    notes = [*start.notes, *_other_template(values, origins, start=start)]
    gave_way = [
        note for section in taken for note in _lay(section, values, origins, start=start, taken=taken)
    ]
    if gave_way:
        notes.append(f"{start.origin} replaces the recipe's {', '.join(gave_way)}")
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
    # The parent's "auto" is the default of its own adapter, which this recipe may not name.
    if model.quantization == "auto":
        model = model.model_copy(update={"quantization": traits.quantization[0]})
    if traits.goes_on_as:
        notes = [
            *notes,
            f"adapter '{adapter.method}' continues as '{traits.goes_on_as}', the form in which it was saved",
        ]
    return Start(name, model, going_on(adapter), template, notes)


def going_on(adapter: AdapterSettings) -> AdapterSettings:
    """Return the settings for training an adapter further: its own, without those of its initialization."""
    traits = adapter_traits(adapter.method)
    # Settings of the initialization (a prompt's init_text) have no effect on trained weights.
    kept = adapter.model_dump(exclude={"method", *traits.at_start})
    return _schema(traits.goes_on_as or adapter.method)(**kept)


def _adapter(content: dict[str, Any]) -> AdapterSettings:
    return _schema(content["method"]).model_validate(content)


def _schema(method: str) -> type[AdapterSettings]:
    schema: type[AdapterSettings] = load_plugin(ADAPTERS, method, where="adapter.method").Settings
    return schema


def _template(stage: str, load: dict[str, Any]) -> dict[str, str | None]:
    """Return a run's template and system prompt; {} for a run on plain text with its default template."""
    data: DataSettings = load_stage(stage).Settings().data
    if data.texts is not None and load["template"] == data.template:
        return {}
    return {"template": load["template"], "system": load["system"]}


def _refuse_scorer(run: str, first: str, *, stage: str) -> None:
    """Raise UserError if a run's model is a reward model and the stage needs one that generates text."""
    if first in SCORERS and first != stage:
        found = f"'{run}' is a run of stage {first}, whose model scores and does not generate text"
        expected = "a run with a generative model, for example of stage sft"
        raise UserError(Problem("model.start", found, expected, ALL_RUNS))


def refuse_lost_files(run: Path, record: dict[str, Any], *, where: str) -> None:
    """Raise UserError if files that a run has saved are missing."""
    lost = [name for name in record.get("files", {}) if not (run / name).is_file()]
    if lost or not record.get("files"):
        found = f"'{run}' lacks {', '.join(lost)}" if lost else f"'{run}' has no saved weights"
        repair = f"run it again: `{record['command']} --force`"
        raise UserError(Problem(where, found, "a run with its saved weights", repair))


def _shown(run: Path) -> str:
    """Return a run's folder, relative to the working directory if it is below it."""
    whole, here = run.resolve(), Path.cwd().resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def _taken(start: Start, values: Values) -> Values:
    """Return the settings that the parent run fixes, by section."""
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
    """Put the parent run's values into one section; return the recipe's values that they replaced."""
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
                del mine[key]  # a setting of the adapter that is rejected below
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
    """Return the inherited settings that the user may override, by ``section.key``."""
    adapter = taken.get("adapter")
    free = adapter_traits(adapter["method"]).in_training if adapter else ()
    return {"model.start", "model.trust_remote_code", *(f"adapter.{key}" for key in free)}


def _contradictions(values: Values, origins: Origins, *, start: Start, taken: Values) -> Iterator[Problem]:
    """Yield a problem per value of the command line that conflicts with the parent run."""
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
        yield Problem(dotted, found, "the value of the run, as training continues from it", _apart(start))
        # Other values that differ follow from another base or adapter.
        if key in ("base", "method"):
            return


def _apart(start: Start) -> str:
    """Return the repair of a value that conflicts with the parent run."""
    if start.adapter is None:
        return "omit one of the two"
    if not Path(start.name).is_dir():
        return "omit it, or set model.start=null for a new adapter on the base"
    run = start.name
    return f"omit it; or `llm-align merge {run}`, then --base {run} in place of --from"


def _same(dotted: str, one: Any, other: Any) -> bool:
    if dotted != "model.base" or one == other or not isinstance(one, str):
        return bool(one == other)
    # A short name, its Hub id and a folder may be the same base.
    try:
        return resolve_base(one) == resolve_base(other)
    except UserError:
        return False


def _other_template(values: Values, origins: Origins, *, start: Start) -> list[str]:
    """Return a note if the recipe's template is not the one that the parent run was trained with."""
    template, learnt = values.get("data", {}).get("template"), start.template.get("template")
    origin = origins.get("data.template", "")
    if learnt is None or template in (None, learnt) or origin == COMMAND_LINE:
        return []
    return [f"data.template={template} ({origin}), but {start.origin} was trained with {learnt}"]
