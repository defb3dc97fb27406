"""Random models and groups, and the reference computation: one forward pass per completion."""

import copy
from collections.abc import Sequence

import torch
from adapter_properties import CONFIGS, WORDS
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from align.preference.groups import Group

Shape = tuple[int, list[int]]
"""Length of a prompt, and the lengths of its completions."""

SHAPES: st.SearchStrategy[list[Shape]] = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5)), min_size=1, max_size=4
)
SOME: list[Shape] = [(4, [3, 5]), (7, [1, 2, 1, 6]), (1, [4])]


def random_model(config: PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """Return a random model whose attention and predictions are far from uniform."""
    torch.manual_seed(0)
    own = copy.deepcopy(config)  # a trainer writes into it
    model = AutoModelForCausalLM.from_config(own, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(5.0)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
            assert torch.isfinite(weight).all(), name
    return model.eval()


def tiny(family: str, attention: str = "sdpa") -> PreTrainedModel:
    return random_model(CONFIGS[family], attention)


def random_groups(shapes: Sequence[Shape], seed: int = 0) -> list[Group]:
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(1, WORDS, (length,), generator=draw)

    return [Group(ids(prompt), tuple(ids(length) for length in lengths)) for prompt, lengths in shapes]


def plain_logps(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Return log p(completion | prompt) the plain way: one row per pass, all logits, shifted by one."""
    logps_by_completion = []
    for group in groups:
        for completion in group.completions:
            row = torch.cat([group.prompt, completion])
            logps = model(input_ids=row[None]).logits[0, -len(row) :].float().log_softmax(-1)
            completion_logps = logps[len(group.prompt) - 1 : -1]
            logps_by_completion.append(completion_logps.gather(1, completion[:, None]).sum())
    return torch.stack(logps_by_completion)


def weighted_sum(logps: Tensor) -> Tensor:
    """Return a sum in which each completion has a different weight, positive or negative."""
    return (torch.linspace(-1.0, 1.7, len(logps)) * logps).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every trained weight, and clear it."""
    model.zero_grad()
    loss.backward()
    trained = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    grads = {name: gradient.clone() for name, gradient in trained.items()}
    model.zero_grad()
    return grads


def gradient_error(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of each expected tensor."""
    assert grads.keys() == expected.keys() and grads
    scales = {name: max(float(value.abs().max()), 1e-3) for name, value in expected.items()}
    return max(float((grads[name] - expected[name]).abs().max()) / scales[name] for name in expected)


def logp_error(logps: Tensor, expected: Tensor) -> float:
    """Return the largest difference of summed log-probabilities, relative where they are above 1 nat."""
    assert logps.shape == expected.shape and logps.dtype == torch.float32
    return float(((logps - expected).detach() / expected.detach().abs().clamp(min=1.0)).abs().max())
