"""Sample completions from the policy at a temperature, without top-p or top-k truncation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from align.rl.settings import SamplingSettings
from finetune.distributed.collectives import all_gather_object, shard, unshard
from finetune.distributed.rank import dist_info
from finetune.distributed.sharding import is_sharded
from finetune.generation.sampler import (
    SampledCompletion,
    TokenIds,
    generate_batch,
    ignores_padding,
    length_batches,
    until_stop_token,
)
from finetune.recipe.errors import Problem, UserError
from finetune.training.auto_values import GENERATION_TOKENS


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
    tokens_per_batch: int
    generation_batch_size: int | None = None

    @classmethod
    def from_settings(cls, device: str, settings: SamplingSettings, *, stop_ids: Sequence[int]) -> "Sampling":
        """Return the recipe's sampling parameters, with a batch size for the device if it is ``auto``."""
        tokens_per_batch = GENERATION_TOKENS[device]
        generation_batch_size = (
            None if settings.generation_batch_size == "auto" else settings.generation_batch_size
        )
        return cls(
            settings.temperature, settings.max_new_tokens, stop_ids, tokens_per_batch, generation_batch_size
        )


class ShardedMultinomial(LogitsProcessor):  # type: ignore[misc]
    """Samples this process's rows of a batch exactly as a single process with the whole batch would.

    With E_i from the exponential distribution, argmax p_i / E_i is i with probability p_i; that is how
    ``torch.multinomial`` samples one token per row, from the same random numbers.
    """

    def __init__(self, local_rows: Sequence[int], batch_size: int, *, temperature: float) -> None:
        """Select the rows ``local_rows`` of a global batch of ``batch_size`` rows."""
        self.local_rows, self.batch_size, self.temperature = list(local_rows), batch_size, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores whose argmax is the sampled token, for greedy decoding."""
        # Noise for the whole batch: every rank consumes the random stream of a single process.
        self.noise = scores.new_empty(self.batch_size, scores.shape[-1])
        probs = (scores if self.temperature == 1.0 else scores / self.temperature).softmax(-1)
        scaled_probs: Tensor = probs / self.noise.exponential_()[self.local_rows]
        return scaled_probs

    def skip(self, steps: int) -> None:
        """Consume the random numbers of steps that only other rows needed."""
        for _ in range(steps):
            self.noise.exponential_()


@torch.no_grad()
def sample_completions(
    model: nn.Module, prompts: Sequence[TokenIds], *, sampling: Sampling, seed: int
) -> list[SampledCompletion]:
    """Sample one completion per prompt, in the order of the prompts.

    The result depends on the arguments alone. Several processes sample a shard each, get the same completions
    as a single process would, and return all of them.

    Args:
        model: a causal LM in any wrapper with ``generate``; it samples without dropout.
        prompts: token ids; repeat a prompt for several completions.
        sampling: sampling parameters.
        seed: random seed.
    """
    completions: dict[int, SampledCompletion] = {}
    was_training, device = model.training, next(model.parameters()).device
    # With dropout the policy would not sample from the distribution that is scored later.
    model.eval()
    # A seed of its own and no change of the global random state: this lets a run resume bit for bit.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for indices in _length_batches(prompts, sampling):
            new_ids = _generate_sharded(model, [prompts[index] for index in indices], sampling)
            completions |= {
                index: until_stop_token(ids, sampling.stop_ids)
                for index, ids in zip(indices, new_ids, strict=True)
            }
    model.train(was_training)
    return [completions[index] for index in range(len(prompts))]


def _length_batches(prompts: Sequence[TokenIds], sampling: Sampling) -> list[list[int]]:
    return length_batches(
        [len(prompt) for prompt in prompts],
        max_new_tokens=sampling.max_new_tokens,
        tokens_per_batch=sampling.tokens_per_batch,
        max_batch_size=sampling.generation_batch_size,
    )


def _generate_sharded(model: nn.Module, prompts: Sequence[TokenIds], sampling: Sampling) -> list[list[int]]:
    """Return the new tokens of each row of a batch; each process generates its shard."""
    if dist_info().world_size == 1:
        return _generate_batch(model, prompts, sampling)
    # A rank without rows generates one anyway: a sharded model all-gathers in every forward pass.
    local_rows = shard(range(len(prompts))) or range(1)
    sampler = ShardedMultinomial(local_rows, len(prompts), temperature=sampling.temperature)
    new_ids = _generate_batch(model, [prompts[index] for index in local_rows], sampling, sampler)
    shards = all_gather_object(new_ids)
    # A rank whose rows ended early stopped generating: advance its random stream as far as that of the
    # rank that took longest.
    sampler.skip(max(len(rows[0]) for rows in shards) - len(new_ids[0]))
    return unshard(shards)[: len(prompts)]


def _generate_batch(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    sampler: ShardedMultinomial | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, padded to the longest; without ``sampler`` transformers samples."""
    if len(set(map(len, prompts))) > 1 and ignores_padding(model):
        actual = "prompts of different lengths, and a model that reads no mask of their padding"
        repair = "sampling.generation_batch_size=1, or another base"
        raise UserError(Problem("model.base", actual, "a model that reads the mask", repair))
    # Explicit: the model's own generation_config may set top-k and top-p.
    sampling_arguments = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **(sampling_arguments if sampler is None else {"do_sample": False}),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=sampling.stop_ids[0],
    )
    synced = sampler is not None and is_sharded(model)
    return generate_batch(model, prompts, config, processor=sampler, synced=synced)
