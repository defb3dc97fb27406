"""What sampling and scoring hold: keys and values of what has been written, and passes without gradients."""

from finetune.planning.workload import Workload


def rollout(workload: Workload) -> dict[str, int]:
    """Return the cache of keys and values at a reply's last token, and the logits of a token."""
    assert workload.rollout is not None
    return {
        "key-value cache": cache_bytes(workload),
        "logits and loss": 3 * 4 * workload.rollout.lines * workload.architecture.vocabulary,
        "workspace": 2 * cache_bytes(workload) // workload.architecture.layers,
    }


def cache_bytes(workload: Workload) -> int:
    """Return keys and values of all layers, of prompts and completions."""
    model, asked = workload.architecture, workload.rollout
    assert asked is not None
    width = asked.prompt + asked.completion + workload.adapter.virtual_tokens
    return 2 * model.layers * asked.lines * width * model.keys * workload.bytes


def scoring(workload: Workload) -> dict[str, int]:
    """Return a pass without gradients: the states of one layer, and the logits."""
    numbers = workload.predicted * workload.architecture.vocabulary
    states = workload.tokens * workload.bytes
    return {
        "activations": states * (2 * workload.architecture.hidden + 3 * workload.architecture.intermediate),
        "logits and loss": 8 * numbers,
    }
