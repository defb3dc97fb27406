"""Static memory of a run: weights, gradients and optimizer states, quantized (NF4, int8) and sharded."""

from dataclasses import dataclass
from math import ceil

from finetune.planning.architecture import Architecture, Linear
from finetune.planning.trained import targets, trained_parameters
from finetune.planning.workload import (
    BYTES,
    LOW_RANK,
    PARTED_GRADIENTS,
    PARTED_STATES,
    PARTED_WEIGHTS,
    Adapter,
    Quantization,
    Workload,
)

NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights per scale, and scales per second-level scale (arXiv 2305.14314, section 3)."""
NF4_TABLES = 4 * (16 + 256) + 4
"""The 16 values of the code, the 256 of the scales' code, and the scales' mean: float32."""
ADAM_8BIT_BLOCK, ADAM_8BIT_LEAST = 256, 4096
"""bitsandbytes: elements per scale; smaller tensors have float32 states."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes that a process holds throughout a run.

    Attributes:
        base: frozen weights, or the full model where it is trained.
        adapter: trained weights next to the base, and frozen weights that the adapter adds.
        gradients: of all trained weights.
        optimizer: states.
        step_workspace: temporaries of an optimizer step.
        host: in host memory.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    step_workspace: int
    host: int


def resident(workload: Workload) -> Resident:
    """Return the static memory of a process, with what the strategy shards divided by the process count.

    The reference policy and PPO hold a copy of the trained weights' initial values (StartingPolicy).

    ZeRO-1 shards the optimizer states, ZeRO-2 the gradients too, ZeRO-3 and FSDP2 the weights too
    (Rajbhandari et al. 2019, arXiv 1910.02054, section 5).
    """
    model, adapter = workload.architecture, workload.adapter
    trained = trained_parameters(model, adapter, heads=0 if workload.objective == "ppo" else workload.heads)
    value = _value(workload)
    # The reference log-probabilities are computed with the initial values of the trained weights.
    kept = trained if workload.objective == "ppo" or workload.live_reference else 0
    beside = 0 if adapter.whole_model else 4 * trained
    own = beside + 4 * (value + kept) + _frozen_beside(workload) + workload.scorers * beside
    # Under full tuning the value model cannot share the policy's base.
    whole = adapter.whole_model and workload.objective == "ppo"
    states = optimizer_bytes(workload, trained + value)
    shared = _shares(workload)
    # Paged and offloaded optimizer states are in host memory.
    host = states if workload.optimizer == "paged_adamw" or workload.offload != "none" else 0
    # The foreach implementation, the default on CUDA, allocates one temporary of all parameters' size.
    foreach = 4 * (trained + value) if workload.device == "cuda" and not host else 0
    return Resident(
        base=ceil((2 if whole else 1) * base_bytes(workload) / shared["weights"]),
        adapter=ceil(own / shared["weights"]),
        gradients=ceil(4 * (trained + value) / shared["gradients"]),
        optimizer=0 if host else ceil(states / shared["states"]),
        step_workspace=ceil(foreach / shared["states"]),
        host=ceil(host / shared["states"]),
    )


def gathered(workload: Workload) -> int:
    """Return the bytes of all-gathered weights (ZeRO-3, FSDP2): the current layer and the prefetched one.

    They are gathered in their stored format: quantized weights quantized, trained ones in float32.
    """
    if workload.strategy not in PARTED_WEIGHTS or workload.processes == 1:
        return 0
    model, stored = workload.architecture, workload.quantization
    # Decoder layers alone: the vision tower does not run on text.
    inside = [one for one in model.linear_layers() if one.count == model.layers]
    layer = sum(quantized_bytes(one, stored, workload) for one in inside)
    wider = 4 // workload.bytes if workload.adapter.whole_model else 1
    return 2 * wider * max(layer, model.vocabulary * model.hidden * workload.bytes)


def _value(workload: Workload) -> int:
    """Return PPO's trained value parameters: an adapter like the policy's, or LoRA, and a score head."""
    if workload.objective != "ppo":
        return 0
    fresh = Adapter() if workload.adapter.whole_model else workload.adapter
    return trained_parameters(workload.architecture, fresh, heads=1)


def _frozen_beside(workload: Workload) -> int:
    """Return the bytes of frozen adapter weights: VeRA's two matrices, prompts of earlier tasks."""
    adapter = workload.adapter
    if adapter.method == "vera":
        sizes = targets(workload.architecture, adapter)
        widest = max(one.inputs for one in sizes) + max(one.outputs for one in sizes)
        return 4 * adapter.rank * widest
    return 4 * adapter.frozen_tokens * workload.architecture.hidden


def base_bytes(workload: Workload) -> int:
    """Return the bytes of the base: quantized linear layers, and the rest in the compute dtype.

    Trained weights stay in float32 (mixed precision). A model with a score head has no output embeddings.
    """
    architecture = workload.architecture
    # AutoModelForSequenceClassification drops an untied output head.
    headless = workload.objective == "scores" and not architecture.tied
    parameters = architecture.parameters - (architecture.vocabulary * architecture.hidden if headless else 0)
    if workload.adapter.whole_model:
        return 4 * parameters
    linear = architecture.linear_layers()
    weights = sum(layer.weights for layer in linear)
    rest = (parameters - weights) * workload.bytes
    return rest + sum(
        layer.count * quantized_bytes(layer, workload.quantization, workload) for layer in linear
    )


def quantized_bytes(layer: Linear, quantization: Quantization, workload: Workload) -> int:
    """Return the bytes of one weight (out, in).

    NF4: two weights per byte, an 8-bit scale per 64 of them, a float32 scale per 256 scales, and the tables.
    int8: one byte per weight, one float32 scale per output.
    """
    numbers = layer.inputs * layer.outputs
    if quantization == "nf4":
        scales = ceil(numbers / NF4_BLOCK)
        return ceil(numbers / 2) + scales + 4 * ceil(scales / NF4_SCALES) + NF4_TABLES
    if quantization == "int8":
        return numbers + 4 * layer.outputs
    return numbers * BYTES[workload.precision]


def optimizer_bytes(workload: Workload, trained: int) -> int:
    """Return the bytes of an optimizer's states.

    AdamW: two float32 moments per element. 8-bit: two bytes per element and two float32 scales per block of
    256 (Dettmers et al. 2021, arXiv 2110.02861). Adafactor: one value per row and per column of a matrix
    (Shazeer and Stern 2018, arXiv 1804.04235).
    """
    if workload.optimizer == "adamw_8bit":
        return 2 * trained + 2 * 4 * ceil(trained / ADAM_8BIT_BLOCK)
    if workload.optimizer == "adafactor":
        return 4 * _factored(workload.architecture, workload, trained)
    return 8 * trained


def _factored(architecture: Architecture, workload: Workload, trained: int) -> int:
    adapter = workload.adapter
    if adapter.whole_model:
        rows = sum(layer.count * (layer.inputs + layer.outputs) for layer in architecture.linear_layers())
        return rows + 2 * (architecture.vocabulary + architecture.hidden)
    if adapter.method in LOW_RANK:
        chosen = targets(architecture, adapter)
        return sum(one.count * (one.inputs + one.outputs + 2 * adapter.rank) for one in chosen)
    return trained


def _shares(workload: Workload) -> dict[str, int]:
    """Return the number of shards of weights, gradients and optimizer states."""
    n, strategy = workload.processes, workload.strategy
    return {
        "weights": n if strategy in PARTED_WEIGHTS else 1,
        "gradients": n if strategy in PARTED_GRADIENTS else 1,
        "states": n if strategy in PARTED_STATES else 1,
    }
