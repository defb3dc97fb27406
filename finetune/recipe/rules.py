"""Rules of every stage's recipe: incompatible settings and missing files; nothing is loaded."""

from collections.abc import Collection, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from finetune.recipe.bases import resolve_base
from finetune.recipe.compatibility import Rule, caught, is_set, problems_of, within
from finetune.recipe.discovery import (
    ADAPTERS,
    TEMPLATES,
    adapter_traits,
    load_plugin,
    load_stage,
    local_path,
    looks_local,
    plugin_names,
)
from finetune.recipe.engine_rules import ENGINE_RULES
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.mixture_rules import MIXTURE_RULES
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.renamed import renamed_value
from finetune.recipe.settings import StageSettings
from finetune.recipe.user_arguments import load_graders
from finetune.recipe.user_function import function_file

HOLD_OUT_REPAIR = "set data.held_out to a number of rows (100), a fraction (0.1) or a file"


def cross_field_problems(stage: str, settings: StageSettings, valid: Collection[str]) -> list[Problem]:
    """Return the problems between settings that are each valid by themselves.

    Args:
        stage: the recipe's stage.
        settings: a recipe's sections; those that are not ``valid`` hold defaults.
        valid: the names of the valid sections; a rule that reads any other section is skipped.
    """
    properties = recipe_properties(stage, settings, valid)
    method = settings.adapter.method if "adapter" in valid else None
    return problems_of(rules_of(stage, method), settings, properties, valid)


def recipe_properties(stage: str, settings: StageSettings, valid: Collection[str]) -> dict[str, Any]:
    """Return what is known of a recipe when it is loaded; those of invalid sections are missing."""
    # An invalid section holds defaults, and a rule that reads it would report problems of those.
    sections = {name: section for name, section in settings if name in valid}
    properties: dict[str, Any] = {"stage": stage}
    for name, section in sections.items():
        properties |= {f"{name}.{key}": value for key, value in section}
    if "adapter" in valid:
        quantization = settings.model.quantization if "model" in valid else None
        engine = settings.train.engine if "train" in valid else None
        properties |= adapter_properties(settings.adapter.method, quantization=quantization, engine=engine)
    return properties


def adapter_properties(method: str, *, quantization: str | None, engine: str | None) -> dict[str, Any]:
    """Return the properties that follow from an adapter's traits.

    Args:
        method: the adapter.
        quantization: of the base, ``auto`` is the adapter's default; None: not known.
        engine: None: not known.
    """
    traits = adapter_traits(method)
    properties = {f"traits.{name}": value for name, value in asdict(traits).items()}
    if quantization is not None:
        quantization = traits.quantization[0] if quantization == "auto" else quantization
        properties["model.quantization"] = quantization
        properties["quantization_supported"] = quantization in traits.quantization
        properties["quantizations"] = one_of(traits.quantization)
        # A base that is not quantized has LoRA, and a quantized one QLoRA.
        properties["other_adapter"] = (
            "adapter.method=lora for an unquantized base"
            if method == "qlora"
            else "another adapter (qlora for a 4-bit base)"
        )
    if engine is not None:
        properties["engine_supported"] = engine in traits.engines
        properties["engines"] = one_of(traits.engines)
    return properties


@cache
def rules_of(stage: str, method: str | None) -> tuple[Rule, ...]:
    """Return the rules of a recipe: those of all recipes, of its adapter (None: not known), of its stage."""
    return (*RULES, *(adapter_rules(method) if method is not None else ()), *stage_rules(stage))


@cache
def stage_rules(stage: str) -> tuple[Rule, ...]:
    """Return the rules in a stage's file."""
    # Most stages and adapters have rules, but they need not.
    rules: tuple[Rule, ...] = getattr(load_stage(stage), "RULES", ())
    return tuple(within(rule, "stage", stage) for rule in rules)


@cache
def adapter_rules(method: str) -> tuple[Rule, ...]:
    """Return the rules in an adapter's file."""
    rules: tuple[Rule, ...] = getattr(load_plugin(ADAPTERS, method, where="adapter.method"), "RULES", ())
    return tuple(within(rule, "adapter.method", method) for rule in rules)


def check_batch_divides(batch_size: int, micro_batch_size: int, num_processes: int) -> None:
    """Raise UserError if TRL's optimizer steps would hold more rows than ``train.batch_size``."""
    # TRL multiplies micro-batch size, accumulation steps and processes: the product must be the batch size.
    if batch_size % num_processes:
        actual = f"{batch_size}, with {num_processes} processes"
        expected = "a multiple of the processes: TRL gives each the same number of rows per step"
        fits = batch_size + num_processes - batch_size % num_processes
        raise UserError(Problem("train.batch_size", actual, expected, f"train.batch_size={fits}"))
    local_batch_size = batch_size // num_processes
    if local_batch_size % micro_batch_size:
        description = (
            f"({batch_size})" if num_processes == 1 else f"({batch_size}) / {num_processes} processes"
        )
        actual = f"{micro_batch_size}, which does not divide train.batch_size {description}"
        expected = "a divisor of it: with TRL all micro-batches of a step have the same size"
        fits = max(size for size in range(1, micro_batch_size) if local_batch_size % size == 0)
        raise UserError(Problem("train.micro_batch_size", actual, expected, f"train.micro_batch_size={fits}"))


def _check_base(settings: StageSettings) -> list[Problem]:
    return caught(resolve_base, settings.model.base)


def _check_template(settings: StageSettings) -> Iterator[Problem]:
    template, names = settings.data.template, plugin_names(TEMPLATES)
    if template not in names:
        expected = f"{one_of(names)} ({TEMPLATES}/)"
        repair = renamed_value("data.template", template) or did_you_mean(template, names)
        yield Problem("data.template", f"'{template}' is unknown", expected, repair)
    if settings.data.template_options and template != "tokenizer":
        actual = f"set, but data.template is '{template}'"
        yield Problem(
            "data.template_options", actual, "nothing to set", "data.template=tokenizer has variables"
        )


def _check_sources(settings: StageSettings) -> Iterator[Problem]:
    data = settings.data
    if data.source is None and data.mix is None:
        repair = "set data.source (or --data) to a Hub id, a file or a folder"
        yield Problem("data.source", "neither data.source nor data.mix is set", "one of the two", repair)
    elif data.source is not None and data.mix is not None:
        yield Problem(
            "data.mix", "set together with data.source", "one of the two", "list the source in data.mix"
        )
    if data.source is not None:
        yield from _check_file_exists("data.source", data.source)
    for index, source in enumerate(data.mix or []):
        yield from _check_file_exists(f"data.mix[{index}].source", source.source)


def _check_held_out(settings: StageSettings) -> Iterator[Problem]:
    data = settings.data
    held_out = data.held_out
    if isinstance(held_out, str | PythonRows):
        expected = "rows (100), a fraction (0.1), or an existing file or Hub id"
        yield from _check_file_exists("data.held_out", held_out, expected=expected)
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
        if isinstance(text, str):
            yield from caught(function_file, text, where=where)
        else:
            yield from caught(load_graders, {name: text})
    if evaluate.graders and not settings.data.held_out:
        actual, expected = "set, but data.held_out is 0", "held-out prompts for the graders"
        yield Problem("evaluate.graders", actual, expected, HOLD_OUT_REPAIR)
    if evaluate.retention is not None:
        yield from _check_file_exists("evaluate.retention", evaluate.retention)


def _check_file_exists(
    where: str,
    source: str | PythonRows,
    *,
    expected: str = "an existing file or folder, or a Hub id (owner/name)",
) -> Iterator[Problem]:
    # What may be a Hub id is not checked: that needs the network.
    if isinstance(source, str) and looks_local(source) and local_path(source) is None:
        yield Problem(
            where, f"'{source}' does not exist", expected, f"relative paths are resolved from {Path.cwd()}"
        )


def _check_batch_sizes(settings: StageSettings) -> Iterator[Problem]:
    batch, micro = settings.train.batch_size, settings.train.micro_batch_size
    if micro != "auto" and micro > batch:
        repair = "batch_size is the number of sequences per optimizer step: raise it, or lower this"
        actual = f"{micro}, more than train.batch_size ({batch})"
        yield Problem("train.micro_batch_size", actual, f"at most {batch}, or auto", repair)


def _check_trl_batches(settings: StageSettings) -> list[Problem]:
    batch, micro = settings.train.batch_size, settings.train.micro_batch_size
    # One that is larger than the batch is a problem of `_check_batch_sizes`.
    return [] if micro == "auto" or micro > batch else caught(check_batch_divides, batch, micro, 1)


RULES: tuple[Rule, ...] = (
    Rule(
        "base",
        message="model.base is a short name, a Hub id, or a folder with config.json",
        source="recipes/bases.yaml",
        find=_check_base,
        reads=("model",),
    ),
    Rule(
        "flash-float32",
        {"model.attention": ("flash_attention_2",), "model.precision": ("float32",)},
        source="FlashAttention-2's kernels exist for float16 and bfloat16 only",
        problem=Problem(
            "model.attention",
            "'flash_attention_2', but model.precision is float32",
            "sdpa for float32",
            "model.attention=sdpa, or model.precision=bfloat16",
        ),
    ),
    Rule(
        "template",
        message="data.template is a file of data_templates/, or `tokenizer`, which alone has "
        "data.template_options",
        source="data_templates/",
        find=_check_template,
        reads=("data",),
    ),
    Rule(
        "sources",
        message="data.source or data.mix is set, and local files exist",
        source="finetune/data/sources.py",
        find=_check_sources,
        reads=("data",),
    ),
    *MIXTURE_RULES,
    Rule(
        "held-out",
        message="data.held_out is not the training data, on which evaluation does not show generalization",
        source="finetune/data/load.py",
        find=_check_held_out,
        reads=("data",),
    ),
    Rule(
        "held-out-evals",
        message="generation evals need held-out rows",
        source="finetune/training/generation_eval.py",
        find=_check_evals,
        reads=("data", "evaluate", "train"),
    ),
    Rule(
        "graders",
        message="graders are functions in existing files, and need held-out prompts",
        source="finetune/training/generation_eval.py",
        find=_check_graders,
        reads=("data", "evaluate"),
    ),
    Rule(
        "quantization",
        {"quantization_supported": (False,)},
        "the adapter does not support this quantization of the base",
        source="finetune/adapters/*.py, TRAITS.quantization",
        changes={"model.quantization": "auto"},
        problem=Problem(
            "model.quantization",
            "'{model.quantization}' with adapter.method '{adapter.method}'",
            "auto, or {quantizations}",
            "model.quantization=auto, or {other_adapter}",
        ),
    ),
    Rule(
        "packing-virtual-tokens",
        {"data.packing": (True,), "traits.packing": (False,)},
        source="finetune/adapters/*.py, TRAITS.packing",
        problem=Problem(
            "data.packing",
            "true with adapter.method '{adapter.method}'",
            "false: each row needs its own virtual tokens, but packed rows would share one set",
            "data.packing=false; rows are batched by length anyway",
        ),
    ),
    Rule(
        "packing-trl",
        {"data.packing": (True,), "train.engine": ("trl",)},
        source="finetune/engines/trl/trainer.py",
        problem=Problem(
            "data.packing",
            "true with train.engine 'trl'",
            "false: llm-align's packing preserves the batches, TRL's changes them",
            "train.engine=native, or train.engine_args={{padding_free: true}}",
        ),
    ),
    Rule(
        "engine",
        {"engine_supported": (False,)},
        "the adapter needs hooks between steps or access to the output head, which TRL's trainers lack",
        source="finetune/adapters/*.py, TRAITS.engines; llama_adapter tested here: TRL finds no log_probs",
        changes={"train.engine": "native"},
        problem=Problem(
            "train.engine",
            "'{train.engine}' with adapter.method '{adapter.method}'",
            "{engines}",
            "train.engine=native: TRL's trainer does not support this adapter",
        ),
    ),
    *ENGINE_RULES,
    Rule(
        "gradient-checkpointing",
        {"train.gradient_checkpointing": (True,), "traits.gradient_checkpointing": (False,)},
        source="finetune/adapters/*.py, TRAITS.gradient_checkpointing",
        problem=Problem(
            "train.gradient_checkpointing",
            "true with adapter.method '{adapter.method}'",
            "false: the prefix is in the key-value cache, which checkpointing disables",
            "train.gradient_checkpointing=false",
        ),
    ),
    Rule(
        "neftune-trl",
        {"train.neftune_alpha": is_set, "train.engine": ("trl",), "adapter.virtual_tokens": bool},
        source="transformers 5.23, integrations/neftune.py: get_input_embeddings of the unwrapped model",
        problem=Problem(
            "train.neftune_alpha",
            "{train.neftune_alpha:g} with train.engine 'trl' and adapter.method '{adapter.method}'",
            "null: TRL does not find the embeddings of a model with virtual tokens",
            "train.engine=native",
        ),
    ),
    Rule(
        "micro-batch",
        message="train.micro_batch_size is at most train.batch_size",
        source="train.batch_size: sequences per optimizer step",
        find=_check_batch_sizes,
        reads=("train",),
    ),
    # The same with several processes, whose number is known at the launch: finetune/training/loading.py.
    Rule(
        "micro-batch-trl",
        {"train.engine": ("trl",), "train.num_processes": (1,)},
        "with TRL, all micro-batches of a step have the same size",
        source="transformers 5.23, trainer.py: get_total_train_batch_size",
        evidence="source",
        find=_check_trl_batches,
        reads=("train",),
    ),
)
"""The rules of every recipe: on its base, its data, and its adapter."""
