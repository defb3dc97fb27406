"""Memory of sampling: the key-value cache and the logits of the last token."""

from finetune.planner.workload import Workload

LOGITS_COPIES = 3
"""Float32 copies of one token's logits: raw, divided by the temperature, as probabilities."""


def decoding_memory(workload: Workload) -> dict[str, int]:
    """Return the memory in use when the last token of a completion is sampled.

    The key-value cache of all layers; appending copies one layer's cache at a time.
    """
    model, generation = workload.architecture, workload.rollout
    assert generation is not None
    layer_bytes = generation.rows * _num_positions(workload) * model.kv_width * workload.itemsize
    # Eager attention copies keys and values to every query head.
    repeated = model.num_heads // model.num_kv_heads if workload.attention == "eager" or model.eager else 0
    return {
        "key-value cache": kv_cache_bytes(workload),
        # Of the last position alone: in the compute dtype, and the float32 copies of sampling.
        "logits and loss": generation.rows * model.vocab_size * (workload.itemsize + 4 * LOGITS_COPIES),
        # Appending concatenates: the layer's new cache exists next to the old one.
        "workspace": layer_bytes * (1 + 2 * repeated),
    }


def kv_cache_bytes(workload: Workload) -> int:
    """Return the bytes of the KV cache; sliding-window layers cache their window alone."""
    model, generation = workload.architecture, workload.rollout
    assert generation is not None
    positions = _num_positions(workload)
    sliding = model.sliding_layers * min(positions, model.sliding_window)
    cached_positions = (model.num_layers - model.sliding_layers) * positions + sliding
    return 2 * cached_positions * generation.rows * model.kv_width * workload.itemsize


def _num_positions(workload: Workload) -> int:
    generation = workload.rollout
    assert generation is not None
    return generation.prompt + generation.completion + workload.adapter.virtual_tokens
