"""Cross-field checks of a recipe: incompatible settings and missing files; nothing is loaded."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from finetune.adapters.traits import Traits
from finetune.recipe.bases import resolve_base
from finetune.recipe.discovery import ADAPTERS, TEMPLATES, load_plugin, plugin_names
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.mixture_checks import check_mixture, check_selection
from finetune.recipe.paths import local_path, looks_local
from finetune.recipe.renamed import renamed_value
from finetune.recipe.settings import StageSettings
from finetune.recipe.user_function import function_file

HOLD_OUT_REPAIR = "set data.held_out to a number of rows (100), a fraction (0.1) or a file"


def cross_field_problems(settings: StageSettings, valid: Collection[str]) -> list[Problem]:
    """Return the problems between settings that are each valid by themselves.

    Args:
        settings: a recipe's sections; those that are not ``valid`` hold defaults.
        valid: the names of the valid sections; a rule that reads any other section is skipped.
    """
    # An invalid section holds defaults, and a rule that reads it would report problems of those.
    shared = [problem for rule, sections in RULES if sections <= set(valid) for problem in rule(settings)]
    return [*shared, *settings.problems(valid)]


def adapter_traits(method: str) -> Traits:
    """Return an adapter's declared traits."""
    traits: Traits = load_plugin(ADAPTERS, method, where="adapter.method").TRAITS
    return traits


def _check_base(settings: StageSettings) -> Iterator[Problem]:
    try:
        resolve_base(settings.model.base)
    except UserError as error:
        yield from error.problems


def _check_attention(settings: StageSettings) -> Iterator[Problem]:
    model = settings.model
    # FlashAttention-2 kernels exist for float16 and bfloat16 only.
    if model.attention == "flash_attention_2" and model.precision == "float32":
        actual = "'flash_attention_2', but model.precision is float32"
        yield Problem(
            "model.attention", actual, "sdpa for float32", "model.attention=sdpa, or model.precision=bfloat16"
        )


def _check_template(settings: StageSettings) -> Iterator[Problem]:
    template, names = settings.data.template, plugin_names(TEMPLATES)
    if template not in names:
        expected = f"{one_of(names)} ({TEMPLATES}/)"
        repair = renamed_value("data.template", template) or did_you_mean(template, names)
        yield Problem("data.template", f"'{template}' is unknown", expected, repair)


def _check_sources(settings: StageSettings) -> Iterator[Problem]:
    data = settings.data
    if data.source is None and data.mix is None:
        repair = "set data.source (or --data) to a hub id, a file or a folder"
        yield Problem("data.source", "neither data.source nor data.mix is set", "one of the two", repair)
    elif data.source is not None and data.mix is not None:
        yield Problem(
            "data.mix", "set together with data.source", "one of the two", "list the source in data.mix"
        )
    if isinstance(data.source, str):
        yield from _check_file_exists("data.source", data.source)
    for index, source in enumerate(data.mix or []):
        yield from _check_file_exists(f"data.mix[{index}].source", source.source)


def _check_held_out(settings: StageSettings) -> Iterator[Problem]:
    data = settings.data
    held_out = data.held_out
    if isinstance(held_out, str):
        yield from _check_file_exists(
            "data.held_out", held_out, expected="rows (100), a fraction (0.1), or an existing file or Hub id"
        )
        mixture_sources = [
            (f"data.mix[{index}].source", entry.source) for index, entry in enumerate(data.mix or [])
        ]
        for where, source in [("data.source", data.source), *mixture_sources]:
            # Evaluating on training rows would look like generalization.
            if held_out == source:
                repair = "data.held_out=0.1 holds out a tenth of the rows"
                actual = f"the same as {where}"
                yield Problem("data.held_out", actual, "rows that are not in the training data", repair)


def _check_evals(settings: StageSettings) -> Iterator[Problem]:
    evals = {
        "evaluate.exact_match": settings.evaluate.exact_match,
        "train.evaluate_every": settings.train.evaluate_every,
    }
    for where, value in evals.items():
        if value and not settings.data.held_out:
            yield Problem(
                where, f"{value}, but data.held_out is 0", "held-out rows to evaluate on", HOLD_OUT_REPAIR
            )


def _check_graders(settings: StageSettings) -> Iterator[Problem]:
    evaluate = settings.evaluate
    for name, text in evaluate.graders.items():
        where = f"evaluate.graders.{name}"
        if not name.isidentifier():
            repair = "write it like a Python identifier: happy_end"
            yield Problem(where, f"the name '{name}'", "letters, digits and _", repair)
        # Only that the file exists; it is imported when the run needs it.
        try:
            function_file(text, where=where)
        except UserError as error:
            yield from error.problems
    if evaluate.graders and not settings.data.held_out:
        actual, expected = "set, but data.held_out is 0", "held-out prompts for the graders"
        yield Problem("evaluate.graders", actual, expected, HOLD_OUT_REPAIR)
    if evaluate.retention is not None:
        yield from _check_file_exists("evaluate.retention", evaluate.retention)


def _check_file_exists(
    where: str, text: str, *, expected: str = "an existing file or folder, or a Hub id (owner/name)"
) -> Iterator[Problem]:
    # What may be a Hub id is not checked: that needs the network.
    if looks_local(text) and local_path(text) is None:
        yield Problem(
            where, f"'{text}' does not exist", expected, f"relative paths are resolved from {Path.cwd()}"
        )


def _check_quantization(settings: StageSettings) -> Iterator[Problem]:
    method, quantization = settings.adapter.method, settings.model.quantization
    allowed = adapter_traits(method).quantization
    if quantization not in ("auto", *allowed):
        repair = "model.quantization=auto, or another adapter (qlora for a 4-bit base)"
        if method == "qlora":
            repair = "model.quantization=auto, or adapter.method=lora for an unquantized base"
        actual = f"'{quantization}' with adapter.method '{method}'"
        yield Problem("model.quantization", actual, f"auto, or {one_of(allowed)}", repair)


def _check_packing(settings: StageSettings) -> Iterator[Problem]:
    if not settings.data.packing:
        return
    method = settings.adapter.method
    if not adapter_traits(method).packing:
        expected = "false: each row needs its own virtual tokens, but packed rows would share one set"
        repair = "data.packing=false; rows are batched by length anyway"
        yield Problem("data.packing", f"true with adapter.method '{method}'", expected, repair)
    if settings.train.engine == "trl":
        expected = "false: our packing preserves the batches, TRL's changes them"
        repair = "train.engine=native, or train.engine_args={padding_free: true}"
        yield Problem("data.packing", "true with train.engine 'trl'", expected, repair)


def _check_adapter(settings: StageSettings) -> Iterator[Problem]:
    method, train = settings.adapter.method, settings.train
    traits = adapter_traits(method)
    yield from settings.adapter.problems()
    if train.engine not in traits.engines:
        actual = f"'{train.engine}' with adapter.method '{method}'"
        repair = "train.engine=native: TRL's trainer does not support this adapter"
        yield Problem("train.engine", actual, one_of(traits.engines), repair)
    if train.gradient_checkpointing and not traits.gradient_checkpointing:
        actual = f"true with adapter.method '{method}'"
        expected = "false: the prefix is in the key-value cache, which checkpointing disables"
        yield Problem("train.gradient_checkpointing", actual, expected, "train.gradient_checkpointing=false")


def _check_neftune(settings: StageSettings) -> Iterator[Problem]:
    alpha, method = settings.train.neftune_alpha, settings.adapter.method
    if alpha is not None and settings.train.engine == "trl" and settings.adapter.positions:
        actual = f"{alpha:g} with train.engine 'trl' and adapter.method '{method}'"
        expected = "null: TRL does not find the embeddings of a model with virtual tokens"
        yield Problem("train.neftune_alpha", actual, expected, "train.engine=native")


def _check_batch_sizes(settings: StageSettings) -> Iterator[Problem]:
    batch, micro = settings.train.batch_size, settings.train.micro_batch_size
    if micro != "auto" and micro > batch:
        repair = "batch_size is the number of sequences per optimizer step: raise it, or lower this"
        actual = f"{micro}, more than train.batch_size ({batch})"
        yield Problem("train.micro_batch_size", actual, f"at most {batch}, or auto", repair)


RULES: tuple[tuple[Callable[[StageSettings], Iterator[Problem]], set[str]], ...] = (
    (_check_base, {"model"}),
    (_check_attention, {"model"}),
    (_check_template, {"data"}),
    (_check_sources, {"data"}),
    (check_mixture, {"data"}),
    (check_selection, {"data"}),
    (_check_held_out, {"data"}),
    (_check_evals, {"data", "evaluate", "train"}),
    (_check_graders, {"data", "evaluate"}),
    (_check_quantization, {"adapter", "model"}),
    (_check_packing, {"adapter", "data", "train"}),
    (_check_adapter, {"adapter", "train"}),
    (_check_neftune, {"adapter", "train"}),
    (_check_batch_sizes, {"train"}),
)
