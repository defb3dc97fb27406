"""Memory of sampling: the key-value cache and the logits of the last token."""

from finetune.planning.workload import Workload

SCORES = 3
"""Float32 copies of one token's logits: raw, divided by the temperature, as probabilities."""


def decoding(workload: Workload) -> dict[str, int]:
    """Return the memory in use when the last token of a completion is sampled.

    The key-value cache of all layers; appending copies one layer's cache at a time.
    """
    model, asked = workload.architecture, workload.rollout
    assert asked is not None
    layer = asked.lines * _columns(workload) * model.keys * workload.bytes
    # Eager attention copies keys and values to every query head.
    repeated = model.heads // model.key_value_heads if workload.attention == "eager" or model.eager else 0
    return {
        "key-value cache": cache_bytes(workload),
        "logits and loss": asked.lines * model.vocabulary * (workload.bytes + 4 * SCORES),
        # Appending concatenates: the layer's new cache exists next to the old one.
        "workspace": layer * (1 + 2 * repeated),
    }


def cache_bytes(workload: Workload) -> int:
    """Return the bytes of the KV cache; sliding-window layers cache their window alone."""
    model, asked = workload.architecture, workload.rollout
    assert asked is not None
    width = _columns(workload)
    sliding = model.sliding_layers * min(width, model.sliding_window)
    columns = (model.layers - model.sliding_layers) * width + sliding
    return 2 * columns * asked.lines * model.keys * workload.bytes


def _columns(workload: Workload) -> int:
    asked = workload.rollout
    assert asked is not None
    return asked.prompt + asked.completion + workload.adapter.virtual_tokens
