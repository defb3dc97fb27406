"""Planner inputs from a recipe's settings: the base's config.json, its architecture, the adapter, the step.

No download: a config.json is read from our table, a folder or the Hugging Face cache.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from finetune.planner.architecture import Architecture
from finetune.planner.workload import Adapter, Workload
from finetune.recipe import yaml_file
from finetune.recipe.bases import load_bases, resolve_base
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import AdapterSettings, ModelSettings, StageSettings

ARCHITECTURES = PROJECT / "recipes" / "architectures.yaml"
ADAMIX_PASSES = 2
DEFAULT_TRAINED_TOKENS = 3
"""BOS, EOS and padding: the tokens that trainable_tokens trains by default."""


def load_architecture(model: ModelSettings) -> Architecture:
    """Return the base's architecture, with the context length of the recipe's RoPE scaling.

    Raises:
        UserError: an unknown base.
    """
    config = load_base_config(model.base, model.revision)
    if model.rope is not None:
        # Multimodal configs nest the decoder's.
        text = config.get("text_config", config)
        extended = {**text, "max_position_embeddings": round(_max_positions(text) * model.rope.factor)}
        config = {**config, "text_config": extended} if "text_config" in config else extended
    return Architecture.from_config(config)


def _max_positions(text: dict[str, Any]) -> int:
    return int(text["max_position_embeddings"])


def load_base_config(base: str, revision: str | None = None) -> dict[str, Any]:
    """Return a base model's config.json; known bases are in our table.

    Args:
        base: short name, Hub id or folder.
        revision: branch, tag or commit of a Hub model.

    Raises:
        UserError: the base does not exist, or its config.json is not on this machine.
    """
    base_id = resolve_base(base)
    if Path(base_id).is_dir():
        return _read_config(Path(base_id) / "config.json")
    known = {entry.id: name for name, entry in load_bases().items()}
    # The table has the configs of the default branches; another revision may differ.
    if base_id in known and revision is None:
        config: dict[str, Any] = yaml_file.read_yaml(ARCHITECTURES)[0][known[base_id]]["config"]
        return config
    cached = try_to_load_from_cache(base_id, "config.json", revision=revision)
    # Neither None (unknown) nor the sentinel of a file that the repository is known to lack.
    if isinstance(cached, str):
        return _read_config(Path(cached))
    raise UserError(_unknown_base(base, base_id, revision, len(known)))


def _unknown_base(base: str, base_id: str, revision: str | None, known: int) -> Problem:
    at = f" at revision '{revision}'" if revision else ""
    text = f"'{base}'{at} is not a known base, and its config.json is not on this machine"
    expected = f"one of {known} short names (`llm-align list bases`), a folder, or a model in the hub's cache"
    option = f" --revision {revision}" if revision else ""
    return Problem("model.base", text, expected, f"hf download {base_id} config.json{option}   (no weights)")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(Problem("model.base", f"{file}: {error}", "the JSON of a config.json")) from error
    if not isinstance(content, dict):
        raise UserError(Problem("model.base", f"{file} is not a JSON object", "the JSON of a config.json"))
    return content


def planned_adapter(settings: AdapterSettings) -> Adapter:
    """Return the adapter settings that memory depends on."""
    values = settings.model_dump()
    target = values.get("target", "all-linear")
    tokens = values.get("tokens")
    own_tokens = int(values.get("virtual_tokens", 0))
    return Adapter(
        method=settings.method,
        rank=_planned_rank(values),
        targets=() if isinstance(target, str) else tuple(target),
        dropout=values.get("dropout", 0.0) > 0,
        # Positions include the frozen prompts of earlier tasks (progressive_prompt).
        virtual_tokens=max(own_tokens, settings.positions),
        frozen_tokens=max(0, settings.positions - own_tokens),
        width=values.get("bottleneck_size", values.get("encoder_hidden_size", 0)),
        experts=values.get("experts", 1),
        placement=values.get("placement", "parallel"),
        encoder=values.get("encoder", "mlp"),
        projection=bool(values.get("projection", False)),
        top_layers=values.get("layers", 0),
        block_size=values.get("block_size", 32),
        tokens=len(tokens) if tokens is not None else DEFAULT_TRAINED_TOKENS,
        forward_passes=ADAMIX_PASSES if values.get("consistency") else 1,
    )


def _planned_rank(values: dict[str, Any]) -> int:
    """Return the rank that memory is needed for: AdaLoRA starts at 1.5 times the final rank."""
    rank = int(values.get("rank", 0))
    if values["method"] == "adalora":
        # It starts with more ranks than it ends with, and the largest count needs the memory.
        return int(values["init_rank"] or -(-3 * rank // 2))
    return rank


def recipe_workload(
    settings: StageSettings,
    *,
    precision: str,
    quantization: str,
    device: str,
    processes: int = 1,
    strategy: str = "single",
    architecture: Architecture | None = None,
) -> Workload:
    """Return a recipe's workload without its rows, which the stage adds.

    Args:
        settings: the recipe's sections.
        precision: as resolved.
        quantization: as resolved.
        device: ``cuda`` or ``cpu``.
        processes: their number.
        strategy: how they shard the training state.
        architecture: of the base, if it is known already.

    Raises:
        UserError: an unknown base.
    """
    attention = settings.model.attention
    # The settings have the same Literal values.
    return Workload(
        architecture=architecture or load_architecture(settings.model),
        adapter=planned_adapter(settings.adapter),
        precision=precision,  # type: ignore[arg-type]
        quantization=quantization,  # type: ignore[arg-type]
        optimizer=settings.train.optimizer,
        checkpointing=settings.train.gradient_checkpointing,
        attention="sdpa" if attention == "auto" else attention,
        device=device,  # type: ignore[arg-type]
        processes=processes,
        strategy=strategy,  # type: ignore[arg-type]
        offload=settings.train.offload,
    )
