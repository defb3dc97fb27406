"""Completions sampled from a policy: whole distribution at a temperature, as its log-probabilities assume."""

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
    """How completions are sampled.

    There is no top-p and no top-k: a policy gradient needs the probability of what was sampled, and that of a
    cut distribution is another one (arXiv 2403.17031 samples so).

    Attributes:
        temperature: the logits are divided by it.
        max_new_tokens: of a completion, at most, its end token included.
        stop_ids: tokens that end one.
        tokens: of a forward pass, prompts and completions together, about.
        lines: prompts that are answered side by side, at most; None: as many as ``tokens`` allows.
    """

    temperature: float
    max_new_tokens: int
    stop_ids: Sequence[int]
    tokens: int
    lines: int | None = None

    @classmethod
    def on(cls, device: str, settings: SamplingSettings, *, stop_ids: Sequence[int]) -> "Sampling":
        """Return sampling in passes that keep a device busy, or of as many replies as is asked for."""
        tokens = GENERATED_AT_ONCE * TOKENS_PER_FORWARD[device]
        lines = None if settings.at_once == "auto" else settings.at_once
        return cls(settings.temperature, settings.max_new_tokens, stop_ids, tokens, lines)


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled; ``ids`` ends with the end token where the policy ``stopped`` by itself."""

    ids: tuple[int, ...]
    stopped: bool


class DrawsOfAll(LogitsProcessor):  # type: ignore[misc]
    """Draws the tokens of some lines of a batch as one process would that has all its lines.

    With E_i from the exponential distribution, argmax p_i / E_i is i with probability p_i; that is how
    ``torch.multinomial`` draws one token a line, from the same random numbers.
    """

    def __init__(self, own: Sequence[int], lines: int, *, temperature: float) -> None:
        """Choose the lines: ``own`` of so many."""
        self.own, self.lines, self.temperature = list(own), lines, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return what is largest at the token that is drawn, for greedy decoding to take."""
        self.noise = scores.new_empty(self.lines, scores.shape[-1])
        shares = (scores if self.temperature == 1.0 else scores / self.temperature).softmax(-1)
        found: Tensor = shares / self.noise.exponential_()[self.own]
        return found

    def skip(self, steps: int) -> None:
        """Let the random numbers of steps pass that other lines needed and these did not."""
        for _ in range(steps):
            self.noise.exponential_()


@torch.no_grad()
def sample(model: nn.Module, prompts: Sequence[Ids], *, sampling: Sampling, seed: int) -> list[Completion]:
    """Return a completion of each prompt, in order; prompts of similar length are answered together.

    The same call gives the same completions, whatever was drawn before, and leaves the global random state
    alone: that is what lets a run resume bit for bit. Several processes answer a share each, draw what one
    would draw, and have all completions.

    Args:
        model: a causal model in any wrapper with ``generate``; it samples without dropout.
        prompts: token ids; for several completions of a prompt give it several times.
        sampling: how.
        seed: decides what is drawn.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Completion] = {}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in _parts(order, [len(prompt) for prompt in prompts], sampling):
            new = _by_all(model, [prompts[index] for index in part], sampling, device)
            found |= {index: _completion(ids, sampling) for index, ids in zip(part, new, strict=True)}
    model.train(training)
    return [found[index] for index in range(len(prompts))]


def _parts(order: Sequence[int], lengths: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Cut prompts, shortest first, into batches of ``tokens`` and ``lines`` at most, or of one prompt."""
    parts: list[list[int]] = [[]]
    for index in order:
        width = lengths[index] + sampling.max_new_tokens
        full = sampling.lines is not None and len(parts[-1]) >= sampling.lines
        if parts[-1] and (full or (len(parts[-1]) + 1) * width > sampling.tokens):
            parts.append([])
        parts[-1].append(index)
    return parts


def _by_all(
    model: nn.Module, prompts: Sequence[Ids], sampling: Sampling, device: torch.device
) -> list[list[int]]:
    """Return the new tokens of each line of a batch; each process answers every size-th."""
    if world().size == 1:
        return _generate(model, prompts, sampling, device)
    own = share(range(len(prompts))) or range(1)  # none is left out: a partitioned model needs all
    draws = DrawsOfAll(own, len(prompts), temperature=sampling.temperature)
    new = _generate(model, [prompts[index] for index in own], sampling, device, draws=draws)
    shares = everyones(new)
    draws.skip(max(len(lines[0]) for lines in shares) - len(new[0]))
    return together(shares)[: len(prompts)]


def _generate(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    device: torch.device,
    draws: DrawsOfAll | None = None,
) -> list[list[int]]:
    """Return the new tokens of each line of a batch, padded to the longest; ``draws``: the library's own."""
    width, pad = max(map(len, prompts)), sampling.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **(drawn if draws is None else {"do_sample": False}),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=pad,
    )
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
    """Return what stands before the padding, which is an end token as well."""
    for place, token in enumerate(ids):
        if token in sampling.stop_ids:
            return Completion(tuple(ids[: place + 1]), stopped=True)
    return Completion(tuple(ids), stopped=False)
