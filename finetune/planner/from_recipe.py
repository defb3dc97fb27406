"""Planner inputs from a recipe's settings: the base's architecture, the adapter, the step."""

from dataclasses import replace
from typing import Any

from finetune.planner.architecture import Architecture
from finetune.planner.workload import Adapter, Workload
from finetune.recipe.base_config import load_base_config, load_stored_quantization
from finetune.recipe.settings import AdapterSettings, ModelSettings, StageSettings

ADAMIX_PASSES = 2
DEFAULT_TRAINED_TOKENS = 3
"""BOS, EOS and padding: the tokens that trainable_tokens trains by default."""


def load_architecture(model: ModelSettings) -> Architecture:
    """Return the base's architecture, with the context length of the recipe's RoPE scaling.

    Raises:
        UserError: an unknown base, or one with an invalid config.json.
    """
    architecture = Architecture.from_config(load_base_config(model.base, model.revision))
    if model.rope is None:
        return architecture
    return replace(architecture, max_positions=round(architecture.max_positions * model.rope.factor))


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
        stored=load_stored_quantization(settings.model.base, settings.model.revision),
        optimizer=settings.train.optimizer,
        checkpointing=settings.train.gradient_checkpointing,
        attention="sdpa" if attention == "auto" else attention,
        device=device,  # type: ignore[arg-type]
        processes=processes,
        strategy=strategy,  # type: ignore[arg-type]
        offload=settings.train.offload,
    )
