"""Static memory of a run: weights, gradients and optimizer states, quantized (NF4, int8) and sharded."""

from dataclasses import dataclass
from math import ceil

from finetune.distributed.strategies import SHARDED_GRADIENTS, SHARDED_OPTIMIZER, SHARDED_WEIGHTS
from finetune.planner.architecture import Architecture, LinearShape
from finetune.planner.parameter_count import count_trainable_parameters, target_layers
from finetune.planner.workload import ITEMSIZES, LORA_METHODS, Adapter, Quantization, Workload

NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
"""Weights per scale, and scales per second-level scale (arXiv 2305.14314, section 3)."""
NF4_CODES = 16
NF4_TABLE_BYTES = 4 * (NF4_CODES + 256) + 4
"""The 16 values of the code, the 256 of the scales' code, and the scales' mean: float32."""
ADAM_8BIT_BLOCK = 256
"""bitsandbytes: elements per scale."""


@dataclass(frozen=True, slots=True)
class StaticMemory:
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


def static_memory(workload: Workload) -> StaticMemory:
    """Return the static memory of a process, with what the strategy shards divided by the process count.

    The reference policy and PPO hold a copy of the trained weights' initial values (ReferencePolicy).

    ZeRO-1 shards the optimizer states, ZeRO-2 the gradients too, ZeRO-3 and FSDP2 the weights too
    (Rajbhandari et al. 2019, arXiv 1910.02054, section 5).
    """
    model, adapter = workload.architecture, workload.adapter
    trainable = count_trainable_parameters(
        model, adapter, heads=0 if workload.objective == "ppo" else workload.heads
    )
    value_parameters = _value_parameters(workload)
    # The reference log-probabilities are computed with the initial values of the trained weights.
    reference_copy = trainable if workload.objective == "ppo" or workload.live_reference else 0
    adapter_bytes = 0 if adapter.full_finetuning else 4 * trainable
    extra_bytes = (
        adapter_bytes
        + 4 * (value_parameters + reference_copy)
        + _frozen_adapter_bytes(workload)
        + workload.scorers * adapter_bytes
    )
    # Under full tuning the value model cannot share the policy's base.
    has_value_base = adapter.full_finetuning and workload.objective == "ppo"
    state_bytes = optimizer_bytes(workload, trainable + value_parameters)
    shards = _shard_counts(workload)
    # Paged and offloaded optimizer states are in host memory.
    host_bytes = state_bytes if workload.optimizer == "paged_adamw" or workload.offload != "none" else 0
    # The foreach implementation, the default on CUDA, allocates one temporary of all parameters' size.
    foreach_bytes = 4 * (trainable + value_parameters) if workload.device == "cuda" and not host_bytes else 0
    return StaticMemory(
        base=ceil((2 if has_value_base else 1) * base_bytes(workload) / shards["weights"]),
        adapter=ceil(extra_bytes / shards["weights"]),
        gradients=ceil(4 * (trainable + value_parameters) / shards["gradients"]),
        optimizer=0 if host_bytes else ceil(state_bytes / shards["states"]),
        step_workspace=ceil(foreach_bytes / shards["states"]),
        host=ceil(host_bytes / shards["states"]),
    )


def gathered_weight_bytes(workload: Workload) -> int:
    """Return the bytes of all-gathered weights (ZeRO-3, FSDP2): the current layer and the prefetched one.

    They are gathered in their stored format: quantized weights quantized, trained ones in float32.
    """
    if workload.strategy not in SHARDED_WEIGHTS or workload.processes == 1:
        return 0
    model, quantization = workload.architecture, workload.quantization
    # Decoder layers alone: the vision tower does not run on text.
    layer_linears = [linear for linear in model.linear_layers() if linear.count == model.num_layers]
    layer_bytes = sum(quantized_bytes(linear, quantization, workload) for linear in layer_linears)
    upcast = 4 // workload.itemsize if workload.adapter.full_finetuning else 1
    # The embeddings are gathered too, as one matrix that may be larger than a layer.
    return 2 * upcast * max(layer_bytes, model.vocab_size * model.hidden_size * workload.itemsize)


def _value_parameters(workload: Workload) -> int:
    """Return PPO's trained value parameters: an adapter like the policy's, or LoRA, and a score head."""
    if workload.objective != "ppo":
        return 0
    value_adapter = Adapter() if workload.adapter.full_finetuning else workload.adapter
    return count_trainable_parameters(workload.architecture, value_adapter, heads=1)


def _frozen_adapter_bytes(workload: Workload) -> int:
    """Return the bytes of frozen adapter weights: VeRA's two matrices, prompts of earlier tasks."""
    adapter = workload.adapter
    if adapter.method == "vera":
        layers = target_layers(workload.architecture, adapter)
        widest = max(layer.in_features for layer in layers) + max(layer.out_features for layer in layers)
        return 4 * adapter.rank * widest
    return 4 * adapter.frozen_tokens * workload.architecture.hidden_size


def base_bytes(workload: Workload) -> int:
    """Return the bytes of the base: quantized linear layers, and the rest in the compute dtype.

    Trained weights stay in float32 (mixed precision). A model with a score head has no output embeddings.
    """
    architecture = workload.architecture
    # AutoModelForSequenceClassification drops an untied output head.
    headless = workload.objective == "scores" and not architecture.tied_embeddings
    parameters = architecture.parameters - (
        architecture.vocab_size * architecture.hidden_size if headless else 0
    )
    if workload.adapter.full_finetuning:
        return 4 * parameters
    linear = architecture.linear_layers()
    weights = sum(layer.weights for layer in linear)
    unquantized_bytes = (parameters - weights) * workload.itemsize
    return unquantized_bytes + sum(_linear_bytes(layer, workload) for layer in linear)


def _linear_bytes(layer: LinearShape, workload: Workload) -> int:
    """Return the bytes of all layers of a kind; a stored base may skip some when quantizing."""
    skipped = 0
    if workload.stored is not None and workload.stored.skip_modules:
        names = workload.architecture.module_names(layer)
        skipped = sum(workload.stored.skips(name) for name in names)
    return (layer.count - skipped) * quantized_bytes(
        layer, workload.quantization, workload
    ) + skipped * quantized_bytes(layer, "none", workload)


def quantized_bytes(layer: LinearShape, quantization: Quantization, workload: Workload) -> int:
    """Return the bytes of one weight (out, in).

    NF4: two weights per byte, an 8-bit scale per 64 of them, a float32 scale per 256 scales, and the tables.
    Without double quantization the scales are float32, and there is one table.
    int8: one byte per weight, one float32 scale per output.
    """
    numel = layer.in_features * layer.out_features
    if quantization == "nf4":
        scales = ceil(numel / NF4_BLOCK)
        if not workload.double_quantization:
            return ceil(numel / 2) + 4 * scales + 4 * NF4_CODES
        return ceil(numel / 2) + scales + 4 * ceil(scales / NF4_SCALE_BLOCK) + NF4_TABLE_BYTES
    if quantization == "int8":
        return numel + 4 * layer.out_features
    return numel * ITEMSIZES[workload.precision]


def optimizer_bytes(workload: Workload, trainable: int) -> int:
    """Return the bytes of an optimizer's states.

    AdamW: two float32 moments per element. 8-bit: two bytes per element and two float32 scales per block of
    256 (Dettmers et al. 2021, arXiv 2110.02861). Adafactor: one value per row and per column of a matrix
    (Shazeer and Stern 2018, arXiv 1804.04235).
    """
    if workload.optimizer == "adamw_8bit":
        return 2 * trainable + 2 * 4 * ceil(trainable / ADAM_8BIT_BLOCK)
    if workload.optimizer == "adafactor":
        return 4 * _adafactor_numel(workload.architecture, workload, trainable)
    return 8 * trainable


def _adafactor_numel(architecture: Architecture, workload: Workload, trainable: int) -> int:
    adapter = workload.adapter
    if adapter.full_finetuning:
        rows = sum(
            layer.count * (layer.in_features + layer.out_features) for layer in architecture.linear_layers()
        )
        return rows + 2 * (architecture.vocab_size + architecture.hidden_size)
    if adapter.method in LORA_METHODS:
        adapted_layers = target_layers(architecture, adapter)
        return sum(
            adapted_layer.count * (adapted_layer.in_features + adapted_layer.out_features + 2 * adapter.rank)
            for adapted_layer in adapted_layers
        )
    return trainable


def _shard_counts(workload: Workload) -> dict[str, int]:
    """Return the number of shards of weights, gradients and optimizer states."""
    processes, strategy = workload.processes, workload.strategy
    return {
        "weights": processes if strategy in SHARDED_WEIGHTS else 1,
        "gradients": processes if strategy in SHARDED_GRADIENTS else 1,
        "states": processes if strategy in SHARDED_OPTIMIZER else 1,
    }
