"""Trainable parameter counts of every adapter, exact, from shapes alone."""

from finetune.planning.architecture import Architecture, Linear
from finetune.planning.workload import BOTTLENECK, LOW_RANK, PREFIX, Adapter
from finetune.recipe.errors import Problem, UserError

KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value")
INNER = ("down_proj", "dense_4h_to_h", "fc2")
LSTM_LAYERS = 2
"""PEFT's default for P-tuning's LSTM."""


def trained_parameters(architecture: Architecture, adapter: Adapter, *, heads: int = 0) -> int:
    """Return the number of trainable parameters.

    Args:
        architecture: the base.
        adapter: the adapter on it.
        heads: outputs of a reward or value head, which is trained together with the adapter.

    Raises:
        UserError: the adapter's size is unknown.
    """
    head = heads * architecture.hidden
    if adapter.whole_model:
        own = architecture.parameters + head
        return own - (0 if architecture.tied or not heads else architecture.vocabulary * architecture.hidden)
    return adapter_parameters(architecture, adapter) + head


def adapter_parameters(architecture: Architecture, adapter: Adapter) -> int:
    """Return the trainable parameters of an adapter without a head.

    Raises:
        UserError: the adapter's size is unknown.
    """
    method = adapter.method
    if method in LOW_RANK or method in ("vera", "oft"):
        return sum(one.count * of_linear(adapter, one) for one in targets(architecture, adapter))
    if method == "ia3":
        return _ia3(architecture)
    if method in PREFIX:
        return _prefix(architecture, adapter)
    if method in BOTTLENECK:
        return _bottlenecks(architecture, adapter)
    if method == "layernorm":
        return sum(norm.parameters for norm in architecture.norms())
    if method == "bitfit":
        linear = sum(one.count * one.outputs for one in architecture.linear_layers() if one.bias)
        return linear + sum(norm.count * norm.width for norm in architecture.norms() if norm.bias)
    return _of_states(architecture, adapter)


def of_linear(adapter: Adapter, layer: Linear) -> int:
    """Return the adapter's parameters on one linear layer.

    A (rank, in) and B (out, rank) of LoRA; DoRA's magnitude per output; AdaLoRA's singular values; VeRA's two
    vectors; OFT's skew-symmetric blocks.
    """
    product = adapter.rank * (layer.inputs + layer.outputs)
    if adapter.method == "dora":
        return product + layer.outputs
    if adapter.method == "adalora":
        return product + adapter.rank
    if adapter.method == "vera":
        return adapter.rank + layer.outputs
    if adapter.method == "oft":
        size = block_size(layer.inputs, adapter.block_size)
        return layer.inputs // size * (size * (size - 1) // 2)
    return product


def block_size(inputs: int, asked: int) -> int:
    """Return OFT's block size: the divisor of a layer's inputs nearest to the requested size, as PEFT does.

    >>> block_size(96, 32), block_size(100, 32)
    (32, 25)
    """
    if asked >= inputs:
        return inputs
    higher = next(size for size in range(asked, inputs + 1) if inputs % size == 0)
    lower = next(size for size in range(asked, 0, -1) if inputs % size == 0)
    return lower if asked - lower <= higher - asked else higher


def targets(architecture: Architecture, adapter: Adapter) -> tuple[Linear, ...]:
    """Return the linear layers that the adapter is attached to."""
    layers = architecture.linear_layers()
    return tuple(one for one in layers if not adapter.targets or one.name in adapter.targets)


def _ia3(architecture: Architecture) -> int:
    """Count one factor per key, per value, and per input of the feed-forward output layer."""
    layers = architecture.linear_layers()
    keys = sum(one.count * one.outputs for one in layers if one.name in KEYS_AND_VALUES)
    return keys + sum(one.count * one.inputs for one in layers if one.name in INNER)


def _prefix(architecture: Architecture, adapter: Adapter) -> int:
    """Count the keys and values of each layer, or the MLP that projects them."""
    width, tokens = architecture.keys, adapter.virtual_tokens
    made = 2 * architecture.layers * width
    if adapter.projection:
        # PEFT's prefix encoder: an embedding and an MLP whose output is all layers' keys and values.
        return tokens * width + (width * width + width) + (width * made + made)
    # One gate per layer, and one per layer and token.
    gates = architecture.layers * (1 + tokens) if adapter.method == "adaptive_prefix" else 0
    return tokens * made + gates


def _bottlenecks(architecture: Architecture, adapter: Adapter) -> int:
    """Count W_down, W_up and their biases over all layers and insertion points."""
    # Houlsby: after attention and after the MLP.
    places = 2 if adapter.placement == "houlsby" and adapter.method == "bottleneck" else 1
    one = 2 * architecture.hidden * adapter.width + adapter.width + architecture.hidden
    return architecture.layers * places * adapter.experts * one


def _of_states(architecture: Architecture, adapter: Adapter) -> int:
    """Count the parameters of adapters that train vectors of hidden size (prompts, embeddings)."""
    hidden, tokens = architecture.hidden, adapter.virtual_tokens
    own = tokens - adapter.frozen_tokens
    if adapter.method in ("prompt", "progressive_prompt"):
        return own * hidden
    if adapter.method == "multitask_prompt":
        # A shared prompt, and a task matrix of rank r.
        return tokens * hidden + tokens * adapter.rank + adapter.rank * hidden
    if adapter.method == "llama_adapter":
        # A prompt and a zero-initialized gate in each of the top layers.
        return min(adapter.top_layers, architecture.layers) * (tokens * hidden + 1)
    if adapter.method == "trainable_tokens":
        return adapter.tokens * hidden
    if adapter.method == "ptuning":
        return tokens * hidden + (_lstm if adapter.encoder == "lstm" else _mlp)(hidden, adapter.width)
    found = f"adapter '{adapter.method}' has no known size"
    repair = "train.max_steps=3 trains three steps; run.json then has the parameter count"
    raise UserError(Problem("adapter.method", found, "one of finetune/adapters/", repair))


def _mlp(hidden: int, width: int) -> int:
    return (hidden * width + width) + (width * width + width) + (width * hidden + hidden)


def _lstm(hidden: int, width: int) -> int:
    """Count a bidirectional LSTM of two layers (4 gates, two biases) and the MLP after it."""
    inputs = [hidden] + [2 * width] * (LSTM_LAYERS - 1)
    lstm = sum(2 * 4 * (wide * width + width * width + 2 * width) for wide in inputs)
    return lstm + (4 * width * width + 2 * width) + (2 * width * hidden + hidden)
