"""Trainable parameter counts of every adapter, exact, from shapes alone."""

from finetune.planner.architecture import Architecture, LinearShape
from finetune.planner.workload import BOTTLENECK_METHODS, LORA_METHODS, PREFIX_METHODS, Adapter
from finetune.recipe.errors import Problem, UserError

KV_MODULES = ("k_proj", "v_proj", "query_key_value")
FEEDFORWARD_MODULES = ("down_proj", "dense_4h_to_h", "fc2")
LSTM_LAYERS = 2
"""PEFT's default for P-tuning's LSTM."""


def count_trainable_parameters(architecture: Architecture, adapter: Adapter, *, heads: int = 0) -> int:
    """Return the number of trainable parameters.

    Args:
        architecture: the base.
        adapter: the adapter on it.
        heads: outputs of a reward or value head, which is trained together with the adapter.

    Raises:
        UserError: the adapter's size is unknown.
    """
    head_parameters = heads * architecture.hidden_size
    if adapter.full_finetuning:
        model_parameters = architecture.parameters + head_parameters
        # A sequence classification model drops an untied output head.
        return model_parameters - (
            0
            if architecture.tied_embeddings or not heads
            else architecture.vocab_size * architecture.hidden_size
        )
    return count_adapter_parameters(architecture, adapter) + head_parameters


def count_adapter_parameters(architecture: Architecture, adapter: Adapter) -> int:
    """Return the trainable parameters of an adapter without a head.

    Raises:
        UserError: the adapter's size is unknown.
    """
    method = adapter.method
    if method in LORA_METHODS or method in ("vera", "oft"):
        return sum(
            layer.count * count_linear_parameters(adapter, layer)
            for layer in target_layers(architecture, adapter)
        )
    if method == "ia3":
        return _count_ia3(architecture)
    if method in PREFIX_METHODS:
        return _count_prefix(architecture, adapter)
    if method in BOTTLENECK_METHODS:
        return _count_bottlenecks(architecture, adapter)
    if method == "layernorm":
        return sum(norm.parameters for norm in architecture.norms())
    if method == "bitfit":
        linear_biases = sum(
            layer.count * layer.out_features for layer in architecture.linear_layers() if layer.bias
        )
        return linear_biases + sum(norm.count * norm.width for norm in architecture.norms() if norm.bias)
    return _count_embeddings(architecture, adapter)


def count_linear_parameters(adapter: Adapter, layer: LinearShape) -> int:
    """Return the adapter's parameters on one linear layer.

    A (rank, in) and B (out, rank) of LoRA; DoRA's magnitude per output; AdaLoRA's singular values; VeRA's two
    vectors; OFT's skew-symmetric blocks.
    """
    product = adapter.rank * (layer.in_features + layer.out_features)
    if adapter.method == "dora":
        return product + layer.out_features
    if adapter.method == "adalora":
        return product + adapter.rank
    if adapter.method == "vera":
        return adapter.rank + layer.out_features
    if adapter.method == "oft":
        size = oft_block_size(layer.in_features, adapter.block_size)
        return layer.in_features // size * (size * (size - 1) // 2)
    return product


def oft_block_size(inputs: int, requested: int) -> int:
    """Return OFT's block size: the divisor of a layer's inputs nearest to the requested size, as PEFT does.

    >>> oft_block_size(96, 32), oft_block_size(100, 32)
    (32, 25)
    """
    if requested >= inputs:
        return inputs
    higher = next(size for size in range(requested, inputs + 1) if inputs % size == 0)
    lower = next(size for size in range(requested, 0, -1) if inputs % size == 0)
    return lower if requested - lower <= higher - requested else higher


def target_layers(architecture: Architecture, adapter: Adapter) -> tuple[LinearShape, ...]:
    """Return the linear layers that the adapter is attached to."""
    layers = architecture.linear_layers()
    return tuple(layer for layer in layers if not adapter.targets or layer.name in adapter.targets)


def _count_ia3(architecture: Architecture) -> int:
    """Count one factor per key, per value, and per input of the feed-forward output layer."""
    layers = architecture.linear_layers()
    kv_parameters = sum(layer.count * layer.out_features for layer in layers if layer.name in KV_MODULES)
    return kv_parameters + sum(
        layer.count * layer.in_features for layer in layers if layer.name in FEEDFORWARD_MODULES
    )


def _count_prefix(architecture: Architecture, adapter: Adapter) -> int:
    """Count the keys and values of each layer, or the MLP that projects them."""
    kv_width, tokens = architecture.kv_width, adapter.virtual_tokens
    layer_kv_width = 2 * architecture.num_layers * kv_width
    if adapter.projection:
        # PEFT's prefix encoder: an embedding and an MLP whose output is all layers' keys and values.
        return (
            tokens * kv_width
            + (kv_width * kv_width + kv_width)
            + (kv_width * layer_kv_width + layer_kv_width)
        )
    # One gate per layer, and one per layer and token.
    gates = architecture.num_layers * (1 + tokens) if adapter.method == "adaptive_prefix" else 0
    return tokens * layer_kv_width + gates


def _count_bottlenecks(architecture: Architecture, adapter: Adapter) -> int:
    """Count W_down, W_up and their biases over all layers and insertion points."""
    # Houlsby: after attention and after the MLP.
    insertions = 2 if adapter.placement == "houlsby" and adapter.method == "bottleneck" else 1
    bottleneck_parameters = (
        2 * architecture.hidden_size * adapter.width + adapter.width + architecture.hidden_size
    )
    return architecture.num_layers * insertions * adapter.experts * bottleneck_parameters


def _count_embeddings(architecture: Architecture, adapter: Adapter) -> int:
    """Count the parameters of adapters that train vectors of hidden size (prompts, embeddings)."""
    hidden_size, tokens = architecture.hidden_size, adapter.virtual_tokens
    trained_tokens = tokens - adapter.frozen_tokens
    if adapter.method in ("prompt", "progressive_prompt"):
        return trained_tokens * hidden_size
    if adapter.method == "multitask_prompt":
        # A shared prompt, and a task matrix of rank r.
        return tokens * hidden_size + tokens * adapter.rank + adapter.rank * hidden_size
    if adapter.method == "llama_adapter":
        # A prompt and a zero-initialized gate in each of the top layers.
        return min(adapter.top_layers, architecture.num_layers) * (tokens * hidden_size + 1)
    if adapter.method == "trainable_tokens":
        return adapter.tokens * hidden_size
    if adapter.method == "ptuning":
        return tokens * hidden_size + (_count_lstm if adapter.encoder == "lstm" else _count_mlp)(
            hidden_size, adapter.width
        )
    actual = f"adapter '{adapter.method}' has no known size"
    repair = "train.max_steps=3 trains three steps; run.json then has the parameter count"
    raise UserError(
        Problem(
            "adapter.method", actual, "an adapter that finetune/planner/parameter_count.py counts", repair
        )
    )


def _count_mlp(hidden_size: int, width: int) -> int:
    return (hidden_size * width + width) + (width * width + width) + (width * hidden_size + hidden_size)


def _count_lstm(hidden_size: int, width: int) -> int:
    """Count a bidirectional LSTM of two layers (4 gates, two biases) and the MLP after it."""
    inputs = [hidden_size] + [2 * width] * (LSTM_LAYERS - 1)
    lstm = sum(2 * 4 * (input_size * width + width * width + 2 * width) for input_size in inputs)
    return lstm + (4 * width * width + 2 * width) + (2 * width * hidden_size + hidden_size)
