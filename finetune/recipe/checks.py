"""Contradictions between settings that are each in order, and files that are not there. Nothing is loaded to know."""

from collections.abc import Callable, Collection, Iterator

from finetune.adapters._traits import Traits
from finetune.recipe.bases import resolve_base
from finetune.recipe.discovery import load_plugin, plugin_names
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.paths import local_path, looks_local
from finetune.recipe.settings import StageSettings


def contradictions(settings: StageSettings, valid: Collection[str]) -> list[Problem]:
    """Return what is wrong between settings that each have the right type.

    Args:
        settings: a recipe's sections; those that are not ``valid`` hold defaults in the mistaken ones' stead.
        valid: the sections that are in order; a rule that reads another one is left out.
    """
    return [problem for rule, sections in RULES if sections <= set(valid) for problem in rule(settings)]


def adapter_traits(method: str) -> Traits:
    """Return what an adapter declares about itself."""
    traits: Traits = load_plugin("finetune.adapters", method, where="adapter.method").TRAITS
    return traits


def _base(settings: StageSettings) -> Iterator[Problem]:
    try:
        resolve_base(settings.model.base)
    except UserError as error:
        yield from error.problems


def _template(settings: StageSettings) -> Iterator[Problem]:
    data = settings.data
    names = plugin_names("data_templates")
    if data.template not in names:
        found = f"'{data.template}' is unknown"
        yield Problem("data.template", found, f"{one_of(names)} (data_templates/)", nearest(data.template, names))


def _sources(settings: StageSettings) -> Iterator[Problem]:
    data = settings.data
    if (data.source is None) == (data.mix is None):
        found = "neither is given" if data.source is None else "both are given"
        repair = "set data.source (or --data) to a hub id, a file or a folder"
        yield Problem("data.source, data.mix", found, "exactly one of them", repair)
    if isinstance(data.source, str):
        yield from _missing_file("data.source", data.source)
    for index, source in enumerate(data.mix or []):
        yield from _missing_file(f"data.mix[{index}].source", source.source)


def _held_out(settings: StageSettings) -> Iterator[Problem]:
    held_out = settings.data.held_out
    if isinstance(held_out, str):
        yield from _missing_file("data.held_out", held_out)
    elif not held_out and settings.evaluate.exact_match:
        found = f"{settings.evaluate.exact_match}, but data.held_out is 0"
        expected = "held-out rows to answer"
        yield Problem("evaluate.exact_match", found, expected, "set data.held_out (rows, a share or a file)")
    elif not held_out and settings.train.evaluate_every:
        found = f"{settings.train.evaluate_every}, but data.held_out is 0"
        repair = "set data.held_out (rows, a share or a file)"
        yield Problem("train.evaluate_every", found, "held-out rows to measure on", repair)


def _missing_file(where: str, text: str) -> Iterator[Problem]:
    if looks_local(text) and local_path(text) is None:
        expected = "an existing file or folder, or a hub id (owner/name)"
        yield Problem(where, f"'{text}' does not exist", expected, "paths count from the current folder")


def _adapter(settings: StageSettings) -> Iterator[Problem]:
    method = settings.adapter.method
    traits = adapter_traits(method)
    wanted = settings.model.quantization
    if wanted not in ("auto", *traits.quantization):
        repair = "leave model.quantization at auto, or choose another adapter"
        if method == "qlora":
            repair = "leave model.quantization at auto, or take adapter.method=lora for an unquantized base"
        expected = f"{one_of(traits.quantization)} for adapter '{method}'"
        yield Problem("model.quantization", f"'{wanted}' with adapter.method '{method}'", expected, repair)
    if settings.data.packing and not traits.packing:
        found = f"true with adapter.method '{method}'"
        expected = "false: its virtual tokens belong in front of each row, and packed rows share one front"
        yield Problem("data.packing", found, expected, "data.packing=false; rows are batched by length anyway")


def _train(settings: StageSettings) -> Iterator[Problem]:
    train = settings.train
    micro = train.micro_batch_size
    if micro != "auto" and micro > train.batch_size:
        found = f"{micro}, more than train.batch_size ({train.batch_size})"
        repair = "batch_size counts the sequences of an optimizer step; raise it or lower micro_batch_size"
        yield Problem("train.micro_batch_size", found, f"at most {train.batch_size}, or auto", repair)
    if not all(0.0 <= beta < 1.0 for beta in train.betas):
        yield Problem("train.betas", f"found {train.betas}", "two numbers from 0 up to, but not including, 1")
    if train.engine == "trl" and settings.data.packing:
        expected = "false: packing here keeps every batch as it is, TRL's makes other batches"
        repair = "train.engine=native, or ask TRL itself: train.engine_args={packing: true}"
        yield Problem("data.packing", "true with train.engine 'trl'", expected, repair)


RULES: tuple[tuple[Callable[[StageSettings], Iterator[Problem]], set[str]], ...] = (
    (_base, {"model"}),
    (_template, {"data"}),
    (_sources, {"data"}),
    (_held_out, {"data", "evaluate", "train"}),
    (_adapter, {"adapter", "model", "data"}),
    (_train, {"train", "data"}),
)
