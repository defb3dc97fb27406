"""Generate completions in batches (left-padded ``model.generate``), with the encoder of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import GenerationConfig, PreTrainedModel

from data_templates.segments import Message
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import all_gather_object, shard, unshard
from finetune.distributed.sharding import is_sharded
from finetune.training.architectures import ignores_padding
from finetune.training.context import RunContext
from finetune.training.model import Policy, TextEncoding

PROMPTS_PER_BATCH = 32


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion's text, and whether it ends with EOS (or another stop token)."""

    text: str
    ended_with_eos: bool


def generate_sharded(
    ctx: RunContext, text: TextEncoding, policy: Policy, prompts: Sequence[Sequence[Message]]
) -> list[Completion]:
    """Generate completions greedily with the current policy, sharded over ranks and gathered on all."""
    with ctx.timed("samples"):
        completions = generate_completions(
            policy.model,
            text.encoder,
            shard(prompts),
            max_new_tokens=ctx.settings.evaluate.max_new_tokens,
            context=text.context,
        )
        return unshard(all_gather_object(completions))


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    context: int,
    temperature: float = 0.0,
) -> list[Completion]:
    """Generate a completion of each conversation; results are in the order of the prompts.

    Args:
        model: a causal model, with or without an adapter.
        encoder: template and tokenizer of its training.
        prompts: conversations that end with the user's turn.
        max_new_tokens: maximum tokens of a completion, capped at half of the context.
        context: positions for prompt and completion together; a longer prompt loses its oldest tokens.
        temperature: 0 is greedy decoding.
    """
    # Half of the context at least is left to the prompt.
    max_new_tokens = min(max_new_tokens, context // 2)
    encoded = [encoder.encode_prompt(prompt)[-(context - max_new_tokens) :] for prompt in prompts]
    batches = _batches([len(ids) for ids in encoded], padded=not ignores_padding(model))
    completions: dict[int, Completion] = {}
    training = model.training
    model.eval()
    sharded = is_sharded(model)
    # With sharded weights each forward pass is a collective: ranks with fewer batches generate dummy ones.
    num_batches = max(all_gather_object(len(batches))) if sharded else len(batches)
    for indices in (batches + [[]] * num_batches)[:num_batches]:
        rows = [encoded[index] for index in indices] or [encoder.stop_ids[:1]]
        new_ids = _generate(model, encoder, rows, max_new_tokens, temperature, synced=sharded)
        completions |= {
            index: _to_completion(encoder, ids)
            for index, ids in zip(indices, new_ids[: len(indices)], strict=True)
        }
    model.train(training)
    return [completions[index] for index in range(len(prompts))]


def _batches(lengths: Sequence[int], *, padded: bool) -> list[list[int]]:
    """Return the indices of prompts in batches of similar lengths, or of equal ones without padding."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = [order]
    if not padded:
        groups = [list(group) for _, group in groupby(order, key=lambda index: lengths[index])]
    return [
        group[start : start + PROMPTS_PER_BATCH]
        for group in groups
        for start in range(0, len(group), PROMPTS_PER_BATCH)
    ]


def _generate(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    *,
    synced: bool,
) -> list[list[int]]:
    prompt_length = max(len(prompt) for prompt in prompts)
    # Any id would do in prompts, where the mask hides it; after a completion a stop id ends the decoding.
    pad_id = encoder.stop_ids[0]
    device = next(model.parameters()).device
    # Left padding: all prompts end at the same position, where generation starts.
    ids_BT = torch.tensor(
        [[pad_id] * (prompt_length - len(prompt)) + prompt for prompt in prompts], device=device
    )
    mask_BT = torch.tensor(
        [[0] * (prompt_length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        # None if greedy: transformers warns of a temperature that it does not use.
        temperature=temperature or None,
        eos_token_id=encoder.stop_ids,
        pad_token_id=pad_id,
    )
    # synced_gpus: a finished rank keeps running forward passes, which are collectives, until all have.
    output = model.generate(
        input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, synced_gpus=synced
    )
    new_ids: list[list[int]] = output[:, prompt_length:].tolist()
    return new_ids


def _to_completion(encoder: Encoder, ids: list[int]) -> Completion:
    return Completion(encoder.decode_reply(ids), any(token in encoder.stop_ids for token in ids))
