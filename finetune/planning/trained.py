"""How many parameters an adapter trains: exact, from shapes alone."""

from finetune.planning.architecture import Architecture, Linear
from finetune.planning.workload import BOTTLENECK, LOW_RANK, PREFIX, Adapter
from finetune.recipe.errors import Problem, UserError

KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value")
INNER = ("down_proj", "dense_4h_to_h", "fc2")
LSTM_LAYERS = 2
"""PEFT's default for P-tuning's LSTM."""


def trained_parameters(architecture: Architecture, adapter: Adapter, *, heads: int = 0) -> int:
    """Return the number of trained parameters.

    Args:
        architecture: the base.
        adapter: what is put on it.
        heads: scores of a reward or value model, whose head is trained beside the adapter.

    Raises:
        UserError: a method whose size is not known here.
    """
    head = heads * architecture.hidden
    if adapter.whole_model:
        own = architecture.parameters + head
        return own - (0 if architecture.tied or not heads else architecture.vocabulary * architecture.hidden)
    return adapter_parameters(architecture, adapter) + head


def adapter_parameters(architecture: Architecture, adapter: Adapter) -> int:
    """Return the trained parameters of an adapter without a head.

    Raises:
        UserError: a method whose size is not known here.
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
    """Return what one linear layer of a name gets.

    A (rank, in) and B (out, rank) of LoRA; DoRA's magnitude of each output; AdaLoRA's singular values; VeRA's
    two vectors; OFT's skew-symmetric blocks.
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
    """Return the size of OFT's blocks that divides a layer's inputs: the nearest one, as PEFT chooses it.

    >>> block_size(96, 32), block_size(100, 32)
    (32, 25)
    """
    if asked >= inputs:
        return inputs
    higher = next(size for size in range(asked, inputs + 1) if inputs % size == 0)
    lower = next(size for size in range(asked, 0, -1) if inputs % size == 0)
    return lower if asked - lower <= higher - asked else higher


def targets(architecture: Architecture, adapter: Adapter) -> tuple[Linear, ...]:
    """Return the linear layers that the adapter sits on."""
    layers = architecture.linear_layers()
    return tuple(one for one in layers if not adapter.targets or one.name in adapter.targets)


def _ia3(architecture: Architecture) -> int:
    """Return a factor of each key, each value, and each input of the last feed-forward layer."""
    layers = architecture.linear_layers()
    keys = sum(one.count * one.outputs for one in layers if one.name in KEYS_AND_VALUES)
    return keys + sum(one.count * one.inputs for one in layers if one.name in INNER)


def _prefix(architecture: Architecture, adapter: Adapter) -> int:
    """Return keys and values of each layer; with a projection, what the MLP that makes them has."""
    width, tokens = architecture.keys, adapter.virtual_tokens
    made = 2 * architecture.layers * width
    if adapter.projection:
        return tokens * width + (width * width + width) + (width * made + made)
    gates = architecture.layers * (1 + tokens) if adapter.method == "adaptive_prefix" else 0
    return tokens * made + gates


def _bottlenecks(architecture: Architecture, adapter: Adapter) -> int:
    """Return W_down, W_up and their biases, one behind or beside each place of each layer."""
    places = 2 if adapter.placement == "houlsby" and adapter.method == "bottleneck" else 1
    one = 2 * architecture.hidden * adapter.width + adapter.width + architecture.hidden
    return architecture.layers * places * adapter.experts * one


def _of_states(architecture: Architecture, adapter: Adapter) -> int:
    """Return what adapters have that are made of vectors as wide as a state."""
    hidden, tokens = architecture.hidden, adapter.virtual_tokens
    own = tokens - adapter.frozen_tokens
    if adapter.method in ("prompt", "progressive_prompt"):
        return own * hidden
    if adapter.method == "multitask_prompt":
        return tokens * hidden + tokens * adapter.rank + adapter.rank * hidden
    if adapter.method == "llama_adapter":
        return min(adapter.top_layers, architecture.layers) * (tokens * hidden + 1)
    if adapter.method == "trainable_tokens":
        return adapter.tokens * hidden
    if adapter.method == "ptuning":
        return tokens * hidden + (_lstm if adapter.encoder == "lstm" else _mlp)(hidden, adapter.width)
    found = f"adapter '{adapter.method}', whose size is not known here"
    repair = "train.max_steps=3 trains three steps, and run.json then has the parameters"
    raise UserError(Problem("adapter.method", found, "one of finetune/adapters/", repair))


def _mlp(hidden: int, width: int) -> int:
    return (hidden * width + width) + (width * width + width) + (width * hidden + hidden)


def _lstm(hidden: int, width: int) -> int:
    """Return a bidirectional LSTM of two layers (4 gates, two biases) and the MLP behind it."""
    inputs = [hidden] + [2 * width] * (LSTM_LAYERS - 1)
    lstm = sum(2 * 4 * (wide * width + width * width + 2 * width) for wide in inputs)
    return lstm + (4 * width * width + 2 * width) + (2 * width * hidden + hidden)
