"""Samplers: prompts as token ids in, completions as token ids out, in the order of the prompts.

``Sampler`` is the protocol that generation, evaluation and RL are written against; ``TransformersSampler``
implements it with transformers' ``generate``, in left-padded batches of similar lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from finetune.distributed.collectives import all_gather_object
from finetune.distributed.sharding import is_sharded

TokenIds = Sequence[int]
FinishReason = Literal["stop", "length"]

IGNORING_PADDING = ("rwkv", "xlstm")
"""Types that do not read the attention mask, so that padding before a prompt changes its completion
(transformers 5.23, ``models/rwkv/modeling_rwkv.py``, ``models/xlstm/modeling_xlstm.py``)."""
MAX_BATCH_SIZE = 256
"""Rows per batch at most: the logits of one step, (rows, vocabulary), are not in the budget of tokens."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How completions are decoded.

    Attributes:
        max_new_tokens: maximum length of a completion, including its stop token.
        temperature: divides the logits; 0 is greedy decoding. There is no top-p or top-k.
        seed: of the samples; without effect on greedy decoding.
        logps: whether completions have the log-probability of each token.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    logps: bool = False


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """A completion.

    Attributes:
        ids: its tokens; the last one is a stop token if ``ended_with_eos``.
        ended_with_eos: whether it ended by itself, and not at the maximum length.
        logps: log-probability of each token in the distribution that it was drawn from (of greedy decoding:
            the model's own), if the sampler was asked for them.
    """

    ids: tuple[int, ...]
    ended_with_eos: bool
    logps: tuple[float, ...] | None = None

    @property
    def finish_reason(self) -> FinishReason:
        """Return why it ended, in the words of OpenAI's API."""
        return "stop" if self.ended_with_eos else "length"


class Sampler(Protocol):
    """Generates a completion of each prompt."""

    def sample(
        self, prompts: Sequence[TokenIds], decoding: Decoding, *, streams: Sequence[int] | None = None
    ) -> list[SampledCompletion]:
        """Return the completions, in the order of the prompts.

        Args:
            prompts: token ids; none is empty. Repeat a prompt for several completions.
            decoding: how they are decoded.
            streams: number of each prompt's random stream; None: its index. A completion depends on its
                prompt, the decoding and its stream, and not on the other prompts of the call.
        """
        ...


@dataclass(frozen=True)
class TransformersSampler:
    """Generates with a causal model of transformers.

    Each row draws from a random stream of its own, so its samples do not depend on the batch. What remains is
    the rounding of matrix products, whose order depends on the shape of the batch: in float32 it changes a
    token only where two are tied to 6 digits, in bfloat16 where they are tied to 2 or 3.

    Attributes:
        model: a causal model in any wrapper with ``generate``; dropout is off while it samples.
        stop_ids: token ids that end a completion.
        tokens_per_batch: approximate maximum of tokens per batch, prompts and completions together.
        max_batch_size: rows per batch at most.
    """

    model: nn.Module
    stop_ids: Sequence[int]
    tokens_per_batch: int
    max_batch_size: int = MAX_BATCH_SIZE

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[TokenIds], decoding: Decoding, *, streams: Sequence[int] | None = None
    ) -> list[SampledCompletion]:
        """Return the completions, in the order of the prompts; see ``Sampler.sample``."""
        streams = range(len(prompts)) if streams is None else streams
        batches = length_batches(
            [len(prompt) for prompt in prompts],
            max_new_tokens=decoding.max_new_tokens,
            tokens_per_batch=self.tokens_per_batch,
            max_batch_size=self.max_batch_size,
            padded=not ignores_padding(self.model),
        )
        sharded = is_sharded(self.model)
        # With sharded weights each forward pass is a collective: ranks with fewer batches generate dummies.
        num_batches = max(all_gather_object(len(batches))) if sharded else len(batches)
        completions: dict[int, SampledCompletion] = {}
        training = self.model.training
        self.model.eval()
        for rows in (batches + [[]] * num_batches)[:num_batches]:
            ids = [prompts[row] for row in rows] or [self.stop_ids[:1]]
            sampled = self._sample_batch(ids, decoding, [streams[row] for row in rows] or [0], sharded)
            completions |= dict(zip(rows, sampled, strict=False))
        self.model.train(training)
        return [completions[row] for row in range(len(prompts))]

    def _sample_batch(
        self, prompts: Sequence[TokenIds], decoding: Decoding, streams: Sequence[int], sharded: bool
    ) -> list[SampledCompletion]:
        device = next(self.model.parameters()).device
        chooser = _TokenChooser(decoding, streams, device)
        new_ids = generate_batch(
            self.model,
            prompts,
            # Greedy: the token is drawn by `chooser`.
            GenerationConfig(
                do_sample=False,
                max_new_tokens=decoding.max_new_tokens,
                eos_token_id=list(self.stop_ids),
                pad_token_id=self.stop_ids[0],
            ),
            processor=chooser,
            synced=sharded,
        )
        logps = chooser.logps() if decoding.logps else [None] * len(new_ids)
        return [
            until_stop_token(ids, self.stop_ids, row_logps)
            for ids, row_logps in zip(new_ids, logps, strict=True)
        ]


class _TokenChooser(LogitsProcessor):  # type: ignore[misc]
    """Draws the token of each row from the row's own random stream, and records its log-probability.

    With E_i from the exponential distribution, argmax p_i / E_i is i with probability p_i.
    """

    def __init__(self, decoding: Decoding, streams: Sequence[int], device: torch.device) -> None:
        self.temperature = decoding.temperature
        self.with_logps = decoding.logps
        self.step_logps: list[Tensor] = []
        self.generators = []
        for stream in streams if self.temperature > 0 else ():
            generator = torch.Generator(device)
            generator.manual_seed(_stream_seed(decoding.seed, stream))
            self.generators.append(generator)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores whose argmax is the chosen token."""
        logps_BV = (scores / (self.temperature or 1.0)).log_softmax(-1)
        chosen_BV = scores
        if self.generators:
            noise_BV = torch.stack(
                [
                    logps_V.new_empty(logps_V.shape).exponential_(generator=generator)
                    for logps_V, generator in zip(logps_BV, self.generators, strict=True)
                ]
            )
            chosen_BV = logps_BV.exp() / noise_BV
        if self.with_logps:
            tokens_B = chosen_BV.argmax(-1, keepdim=True)
            self.step_logps.append(logps_BV.gather(-1, tokens_B).squeeze(-1))
        return chosen_BV

    def logps(self) -> list[list[float]]:
        """Return the log-probabilities of each row's tokens, padded like them."""
        logps: list[list[float]] = torch.stack(self.step_logps, dim=1).tolist()
        return logps


def _stream_seed(seed: int, stream: int) -> int:
    """Return the seed of a random stream: equal pairs have equal seeds, and neighbors unrelated ones."""
    # SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    state = (seed * 0x9E3779B97F4A7C15 + stream + 1) * 0x9E3779B97F4A7C15 % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return (state ^ (state >> 31)) % 2**63


def length_batches(
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    tokens_per_batch: int,
    max_batch_size: int | None = None,
    padded: bool = True,
) -> list[list[int]]:
    """Return the indices of prompts in batches of similar lengths, shortest first.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: maximum tokens of a completion: lengths are unknown before generation.
        tokens_per_batch: tokens of a batch at most, or one prompt.
        max_batch_size: prompts of a batch at most; None: no limit.
        padded: False: a batch has prompts of equal length.

    >>> length_batches([9, 2, 3, 2], max_new_tokens=1, tokens_per_batch=8)
    [[1, 3], [2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    batches: list[list[int]] = []
    for index in order:
        row_tokens = lengths[index] + max_new_tokens
        batch = batches[-1] if batches else []
        is_full = len(batch) == max_batch_size or (len(batch) + 1) * row_tokens > tokens_per_batch
        if not batch or is_full or (not padded and lengths[batch[0]] != lengths[index]):
            batches.append([])
        batches[-1].append(index)
    return batches


def generate_batch(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    config: GenerationConfig,
    *,
    processor: LogitsProcessor | None = None,
    synced: bool = False,
) -> list[list[int]]:
    """Return the new tokens of each row of one batch, padded to the longest with ``config.pad_token_id``.

    Args:
        model: a causal model in any wrapper with ``generate``.
        prompts: their token ids.
        config: all that decides the tokens; what it leaves out is taken from the model's own.
        processor: changes the scores of each step.
        synced: whether a rank whose rows have ended goes on until those of all ranks have: forward passes of
            a sharded model are collectives.
    """
    prompt_length, pad_id = max(map(len, prompts)), config.pad_token_id
    device = next(model.parameters()).device
    # Left padding: every prompt ends at the position from which generation continues.
    ids_BT = torch.tensor(
        [[pad_id] * (prompt_length - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    mask_BT = torch.tensor(
        [[0] * (prompt_length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    output = model.generate(  # type: ignore[operator]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        generation_config=config,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
        synced_gpus=synced,
    )
    new_ids: list[list[int]] = output[:, prompt_length:].tolist()
    return new_ids


def until_stop_token(
    ids: Sequence[int], stop_ids: Sequence[int], logps: Sequence[float] | None = None
) -> SampledCompletion:
    """Return the completion up to its first stop token; padding is a stop token as well."""
    end = next((position for position, token in enumerate(ids, 1) if token in stop_ids), None)
    kept = None if logps is None else tuple(logps[:end])
    return SampledCompletion(tuple(ids[:end]), ended_with_eos=end is not None, logps=kept)


def ignores_padding(model: nn.Module) -> bool:
    """Return whether padding before a prompt changes its completion: the architecture reads no mask."""
    bases = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return any(base.config.model_type in IGNORING_PADDING for base in bases)
