"""Sample completions from the policy at a temperature, without top-p or top-k truncation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from align.rl.settings import SamplingSettings
from finetune.planning.choices import GENERATED_AT_ONCE, TOKENS_PER_FORWARD
from finetune.planning.world import world
from finetune.training.apart import in_parts
from finetune.training.processes import everyones, share, together

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters.

    There is no top-p or top-k: the policy gradient needs the probability of each sampled token, and that of a
    truncated distribution is another one (arXiv 2403.17031 samples like this).

    Attributes:
        temperature: divides the logits.
        max_new_tokens: maximum completion length, including EOS.
        stop_ids: token ids that end a completion.
        tokens_per_batch: approximate budget of tokens per batch, prompts and completions together.
        generation_batch_size: maximum batch size; None: as many rows as ``tokens_per_batch`` allows.
    """

    temperature: float
    max_new_tokens: int
    stop_ids: Sequence[int]
    tokens: int
    lines: int | None = None

    @classmethod
    def on(cls, device: str, settings: SamplingSettings, *, stop_ids: Sequence[int]) -> "Sampling":
        """Return the recipe's sampling parameters, with a batch size for the device if it is ``auto``."""
        tokens = GENERATED_AT_ONCE * TOKENS_PER_FORWARD[device]
        lines = None if settings.at_once == "auto" else settings.at_once
        return cls(settings.temperature, settings.max_new_tokens, stop_ids, tokens, lines)


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion; ``ids`` ends with a stop token if ``ended_with_eos``."""

    ids: tuple[int, ...]
    stopped: bool


class DrawsOfAll(LogitsProcessor):  # type: ignore[misc]
    """Samples this process's rows of a batch exactly as a single process with the whole batch would.

    With E_i from the exponential distribution, argmax p_i / E_i is i with probability p_i; that is how
    ``torch.multinomial`` samples one token per row, from the same random numbers.
    """

    def __init__(self, own: Sequence[int], lines: int, *, temperature: float) -> None:
        """Select the rows ``local_rows`` of a global batch of ``batch_size`` rows."""
        self.own, self.lines, self.temperature = list(own), lines, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores whose argmax is the sampled token, for greedy decoding."""
        # Noise for the whole batch: every rank consumes the random stream of a single process.
        self.noise = scores.new_empty(self.lines, scores.shape[-1])
        shares = (scores if self.temperature == 1.0 else scores / self.temperature).softmax(-1)
        found: Tensor = shares / self.noise.exponential_()[self.own]
        return found

    def skip(self, steps: int) -> None:
        """Consume the random numbers of steps that only other rows needed."""
        for _ in range(steps):
            self.noise.exponential_()


@torch.no_grad()
def sample(model: nn.Module, prompts: Sequence[Ids], *, sampling: Sampling, seed: int) -> list[Completion]:
    """Sample one completion per prompt, in the order of the prompts.

    The result depends on the arguments alone. Several processes sample a shard each, get the same completions
    as a single process would, and return all of them.

    Args:
        model: a causal LM in any wrapper with ``generate``; it samples without dropout.
        prompts: token ids; repeat a prompt for several completions.
        sampling: sampling parameters.
        seed: random seed.
    """
    # Prompts of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Completion] = {}
    training, device = model.training, next(model.parameters()).device
    # With dropout the policy would not sample from the distribution that is scored later.
    model.eval()
    # A seed of its own and no change of the global random state: this lets a run resume bit for bit.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in _parts(order, [len(prompt) for prompt in prompts], sampling):
            new = _by_all(model, [prompts[index] for index in part], sampling, device)
            found |= {index: _completion(ids, sampling) for index, ids in zip(part, new, strict=True)}
    model.train(training)
    return [found[index] for index in range(len(prompts))]


def _parts(order: Sequence[int], lengths: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Split prompts, shortest first, into batches of at most ``tokens`` and ``lines``, or of one prompt."""
    parts: list[list[int]] = [[]]
    for index in order:
        # Budget for the longest completion possible: lengths are unknown before generation.
        width = lengths[index] + sampling.max_new_tokens
        full = sampling.lines is not None and len(parts[-1]) >= sampling.lines
        if parts[-1] and (full or (len(parts[-1]) + 1) * width > sampling.tokens):
            parts.append([])
        parts[-1].append(index)
    return parts


def _by_all(
    model: nn.Module, prompts: Sequence[Ids], sampling: Sampling, device: torch.device
) -> list[list[int]]:
    """Return the new tokens of each row of a batch; each process generates its shard."""
    if world().size == 1:
        return _generate(model, prompts, sampling, device)
    # A rank without rows generates one anyway: a sharded model all-gathers in every forward pass.
    own = share(range(len(prompts))) or range(1)
    draws = DrawsOfAll(own, len(prompts), temperature=sampling.temperature)
    new = _generate(model, [prompts[index] for index in own], sampling, device, draws=draws)
    shares = everyones(new)
    # A rank whose rows ended early stopped generating: advance its random stream as far as that of the
    # rank that took longest.
    draws.skip(max(len(lines[0]) for lines in shares) - len(new[0]))
    return together(shares)[: len(prompts)]


def _generate(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    device: torch.device,
    draws: DrawsOfAll | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, padded to the longest; without ``sampler`` transformers samples."""
    width, pad = max(map(len, prompts)), sampling.stop_ids[0]
    # Left padding: every prompt ends at the position from which generation continues.
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    # Explicit: the model's own generation_config may set top-k and top-p.
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **(drawn if draws is None else {"do_sample": False}),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=pad,
    )
    # synced_gpus: ranks with finished rows go through the forward passes of a sharded model until all have.
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([] if draws is None else [draws]),
        synced_gpus=draws is not None and in_parts(model),
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new


def _completion(ids: Sequence[int], sampling: Sampling) -> Completion:
    """Return the completion up to its first stop token; padding is a stop token as well."""
    for place, token in enumerate(ids):
        if token in sampling.stop_ids:
            return Completion(tuple(ids[: place + 1]), stopped=True)
    return Completion(tuple(ids), stopped=False)
