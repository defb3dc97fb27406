"""Parent run (``model.init_from``, --from): find it, and inherit its model, adapter and template settings."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.checkpoint_folder import model_folder, run_of_checkpoint
from finetune.recipe.command_line import COMMAND_LINE, Origins, SectionValues, learning_rate_note
from finetune.recipe.discovery import (
    adapter_settings,
    adapter_traits,
    load_stage,
    stage_names,
)
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.peft_folder import is_peft_folder, peft_adapter_settings
from finetune.recipe.runs import LIST_RUNS_HINT, RECIPE_FILE, find_run, read_finished_record, repeat_repair
from finetune.recipe.settings import AdapterSettings, DataSettings, ModelSettings, StageSettings
from finetune.recipe.terminal import command_line

SCORING_STAGES = ("reward",)
"""Stages whose model scores and does not generate text: only the same stage can continue from their runs."""

INHERITED_KEYS = ("base", "revision", "trust_remote_code", "quantization", "rope")
INHERITED_UNLESS_SET = ("precision", "attention")
"""Numerics of the parent run, inherited unless the recipe or the user sets them."""


@dataclass(frozen=True)
class ParentRun:
    """The parent run: a finished run, or the recipe of a run that does not exist yet.

    Attributes:
        name: the value of ``model.init_from``: a run's folder, or ``stage/recipe``.
        model: the settings of its base model.
        adapter: the settings of its adapter; None after full tuning.
        template: its ``data.template``, ``data.template_options`` and ``data.system_prompt``; empty if it was
            trained on plain text.
        notes: notes for the user.
        is_peft_folder: whether it is an adapter of PEFT, of which base and settings are known.
    """

    name: str
    model: ModelSettings
    adapter: AdapterSettings | None
    template: dict[str, Any]
    notes: list[str]
    is_peft_folder: bool = False

    @property
    def origin(self) -> str:
        """Return the origin that ``show`` prints for inherited values."""
        if self.is_peft_folder:
            return f"adapter {Path(self.name).name}"
        return f"run {Path(self.name).name if Path(self.name).is_dir() else self.name}"


def is_recipe_name(text: str) -> bool:
    """Return True if ``model.init_from`` is ``stage/recipe`` and not a folder."""
    stage, slash, name = text.partition("/")
    return bool(slash and name) and stage in stage_names() and not Path(text).is_dir()


def parent_from_run(text: str, *, stage: str) -> ParentRun:
    """Return a finished run as the parent of a stage's run.

    Raises:
        UserError: there is no such run, it is not finished, its model does not fit this stage, or its files
            are missing.
    """
    run, note = find_run(text)
    record = read_finished_record(run)
    _check_generative(str(run), record["stage"], stage=stage)
    check_saved_files(run, record, where="model.init_from")
    if is_peft_folder(run):
        return _parent_from_peft_folder(run, record["reload"]["model"])
    model_record, name = record["reload"], _relative_folder(run)
    # The resolved recipe of the run, as its values may come from the command line.
    method = yaml_file.read_yaml((run_of_checkpoint(run) or run) / RECIPE_FILE)[0]["adapter"]
    notes = [note] if note else []
    model = ModelSettings(**{**model_record["model"], "init_from": None})
    # After full tuning the run's own model/ is the new base, so revision and rope are already part of it.
    if model_folder(run) is not None:
        model = model.model_copy(update={"base": name, "revision": None, "rope": None})
    return _build_parent(
        name,
        model,
        _parse_adapter(method),
        template=_template_settings(record["stage"], model_record),
        notes=notes,
    )


def _parent_from_peft_folder(folder: Path, model: dict[str, Any]) -> ParentRun:
    """Return an adapter of PEFT as a parent; it does not say with which template it was trained."""
    adapter = _parse_adapter(peft_adapter_settings(folder))
    settings = ModelSettings(base=model["base"], revision=model["revision"])
    note = f"{folder} does not say with which template it was trained: data.template is the recipe's"
    return ParentRun(_relative_folder(folder), settings, adapter, {}, [note], is_peft_folder=True)


def parent_from_recipe(text: str, parent_stage: str, settings: StageSettings, *, stage: str) -> ParentRun:
    """Return the future run of a recipe of stage ``parent_stage`` as the parent of a run of ``stage``.

    Raises:
        UserError: the model of that stage does not generate text.
    """
    _check_generative(text, parent_stage, stage=stage)
    data = settings.data.model_dump(include={"template", "template_options", "system_prompt"})
    model = settings.model.model_copy(update={"init_from": None})
    return _build_parent(
        text, model, settings.adapter, template=_template_settings(parent_stage, data), notes=[]
    )


def inherit_settings(
    values: SectionValues, origins: Origins, parent: ParentRun
) -> tuple[list[str], list[Problem]]:
    """Put the parent run's settings into a recipe's values.

    They replace values of the recipe's file; values from the command line must be equal to them.

    Returns:
        Notes on replaced values, and problems for conflicting values of the command line.
    """
    inherited = _inherited_values(parent, values)
    # Before anything is replaced: conflicts are with the values of the command line.
    problems = list(_conflicts(values, origins, parent=parent, inherited=inherited))
    previous_method = values.get("adapter", {}).get("method", AdapterSettings().method)
    notes = [*parent.notes, *_template_note(values, origins, parent=parent)]
    notes += _other_base_note(values, origins, parent=parent)
    replaced = [
        note
        for section in inherited
        for note in _inherit_section(section, values, origins, parent=parent, inherited=inherited)
    ]
    if replaced:
        notes.append(f"{parent.origin} replaces the recipe's {', '.join(replaced)}")
    return notes + learning_rate_note(values, origins, previous_method=previous_method), problems


def _build_parent(
    name: str,
    model: ModelSettings,
    adapter: AdapterSettings,
    *,
    template: dict[str, Any],
    notes: list[str],
) -> ParentRun:
    traits = adapter_traits(adapter.method)
    if traits.full_finetuning:
        return ParentRun(name, model, None, template, notes)
    # The parent's "auto" is the default of its own adapter, which this recipe may not name.
    if model.quantization == "auto":
        model = model.model_copy(update={"quantization": traits.quantization[0]})
    if traits.continues_as:
        notes = [
            *notes,
            f"adapter '{adapter.method}' continues as '{traits.continues_as}', the form that was saved",
        ]
    return ParentRun(name, model, continued_settings(adapter), template, notes)


def continued_settings(adapter: AdapterSettings) -> AdapterSettings:
    """Return the settings for training an adapter further: its own, without those of its initialization."""
    traits = adapter_traits(adapter.method)
    # Settings of the initialization (a prompt's init_text) have no effect on trained weights.
    values = adapter.model_dump(exclude={"method", *traits.init_only})
    return adapter_settings(traits.continues_as or adapter.method)(**values)


def _parse_adapter(content: dict[str, Any]) -> AdapterSettings:
    return adapter_settings(content["method"]).model_validate(content)


def _template_settings(stage: str, load: dict[str, Any]) -> dict[str, Any]:
    """Return a run's template, options and system prompt; {} for a run on plain text with its default."""
    data: DataSettings = load_stage(stage).Settings().data
    if data.text_format is not None and load["template"] == data.template:
        return {}
    # Runs recorded before there were options have none.
    options = load.get("template_options")
    inherited = {"template": load["template"], "system_prompt": load["system_prompt"]}
    return inherited | ({"template_options": options} if options else {})


def _check_generative(run: str, parent_stage: str, *, stage: str) -> None:
    """Raise UserError if a run's model is a reward model and the stage needs one that generates text."""
    if parent_stage in SCORING_STAGES and parent_stage != stage:
        actual = f"'{run}' is a run of stage {parent_stage}, whose model scores and does not generate text"
        expected = "a run with a generative model, for example of stage sft"
        raise UserError(Problem("model.init_from", actual, expected, LIST_RUNS_HINT))


def check_saved_files(run: Path, record: dict[str, Any], *, where: str) -> None:
    """Raise UserError if files that a run has saved are missing."""
    missing = [name for name in record.get("files", {}) if not (run / name).is_file()]
    if missing or not record.get("files"):
        actual = f"'{run}' lacks {', '.join(missing)}" if missing else f"'{run}' has no saved weights"
        raise UserError(Problem(where, actual, "a run with its saved weights", repeat_repair(run, record)))


def _relative_folder(run: Path) -> str:
    """Return a run's folder, relative to the working directory if it is below it."""
    folder, here = run.resolve(), Path.cwd().resolve()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _inherited_values(parent: ParentRun, values: SectionValues) -> SectionValues:
    """Return the settings that the parent run fixes, by section."""
    model = parent.model.model_dump()
    section = values.get("model", {})
    keys = [*INHERITED_KEYS, *(key for key in INHERITED_UNLESS_SET if key not in section)]
    if parent.is_peft_folder:
        keys = ["base", "revision"]
    elif parent.adapter is None:
        keys.remove("quantization")  # a new adapter on what is now a base
    data = {key: value for key, value in parent.template.items() if key not in values.get("data", {})}
    inherited = {"model": {"init_from": parent.name, **{key: model[key] for key in keys}}, "data": data}
    if parent.adapter is not None:
        inherited["adapter"] = parent.adapter.model_dump()
    return inherited


def _inherit_section(
    section: str, values: SectionValues, origins: Origins, *, parent: ParentRun, inherited: SectionValues
) -> list[str]:
    """Put the parent run's values into one section; return the recipe's values that they replaced."""
    section_values, inherited_values = values.setdefault(section, {}), inherited[section]
    other_adapter = section_values.get("method", inherited_values.get("method")) != inherited_values.get(
        "method"
    )
    replaced = []
    for key in list(section_values):
        dotted = f"{section}.{key}"
        # The adapter section is replaced completely: keys that only the recipe's adapter has would be
        # invalid.
        is_inherited = section == "adapter" or key in inherited_values
        if dotted == "model.init_from" or not is_inherited:
            continue
        if origins[dotted] == COMMAND_LINE:
            if other_adapter and key not in inherited_values:
                del section_values[key]  # a setting of the adapter that is rejected below
            continue
        value, origin = section_values.pop(key), origins.pop(dotted)
        if key not in inherited_values or not _same_value(dotted, value, inherited_values[key]):
            replaced.append(f"{dotted}={yaml_file.format_value(value)} ({origin})")
    for key, value in inherited_values.items():
        dotted = f"{section}.{key}"
        if (
            origins.get(dotted) != COMMAND_LINE
            or dotted == "model.init_from"
            or dotted not in _overridable_keys(inherited, parent)
        ):
            section_values[key] = value
            # setdefault: a value from the command line, such as --from, is still shown as one.
            origins.setdefault(dotted, parent.origin)
    return replaced


def _overridable_keys(inherited: SectionValues, parent: ParentRun) -> set[str]:
    """Return the inherited settings that the user may override, by ``section.key``."""
    adapter = inherited.get("adapter")
    # adapter_config.json has the path or the name of the base on the machine of whoever trained it.
    base = ("model.base", "model.revision") if parent.is_peft_folder else ()
    overridable = adapter_traits(adapter["method"]).training_only if adapter else ()
    return {"model.init_from", "model.trust_remote_code", *base, *(f"adapter.{key}" for key in overridable)}


def _conflicts(
    values: SectionValues, origins: Origins, *, parent: ParentRun, inherited: SectionValues
) -> Iterator[Problem]:
    """Yield a problem per value of the command line that conflicts with the parent run."""
    fixed = {
        f"{section}.{key}": value for section, content in inherited.items() for key, value in content.items()
    }
    for dotted, inherited_value in fixed.items():
        section, key = dotted.split(".")
        if origins.get(dotted) != COMMAND_LINE or dotted in _overridable_keys(inherited, parent):
            continue
        given_value = values[section][key]
        if _same_value(dotted, given_value, inherited_value):
            continue
        given_text, inherited_text = map(yaml_file.format_value, (given_value, inherited_value))
        actual = f"{given_text}, but {parent.origin} has {inherited_text}"
        yield Problem(
            dotted, actual, "the value of the run, as training continues from it", _conflict_repair(parent)
        )
        # Other values that differ follow from another base or adapter.
        if key in ("base", "method"):
            return


def _conflict_repair(parent: ParentRun) -> str:
    """Return the repair of a value that conflicts with the parent run."""
    if parent.adapter is None:
        return "omit one of the two"
    if not Path(parent.name).is_dir():
        return "omit it, or set model.init_from=null for a new adapter on the base"
    merge = command_line("merge", parent.name)
    return f"omit it; or `{merge}`, then --base {shlex.quote(parent.name)} instead of --from"


def _same_value(dotted: str, first: Any, second: Any) -> bool:
    if dotted != "model.base" or first == second or not isinstance(first, str):
        return bool(first == second)
    # A short name, its Hub id and a folder may be the same base.
    try:
        return resolve_base(first) == resolve_base(second)
    except UserError:
        return False


def _other_base_note(values: SectionValues, origins: Origins, *, parent: ParentRun) -> list[str]:
    """Return a note if an adapter of PEFT continues on another base than its config names."""
    base = values.get("model", {}).get("base")
    if not parent.is_peft_folder or origins.get("model.base") != COMMAND_LINE:
        return []
    if _same_value("model.base", base, parent.model.base):
        return []
    trained = f"{parent.name} was trained on '{parent.model.base}' (adapter_config.json)"
    return [f"{trained}: it continues on '{base}'"]


def _template_note(values: SectionValues, origins: Origins, *, parent: ParentRun) -> list[str]:
    """Return a note if the recipe's template is not the one that the parent run was trained with."""
    template, trained_template = values.get("data", {}).get("template"), parent.template.get("template")
    origin = origins.get("data.template", "")
    if trained_template is None or template in (None, trained_template) or origin == COMMAND_LINE:
        return []
    return [f"data.template={template} ({origin}), but {parent.origin} was trained with {trained_template}"]
