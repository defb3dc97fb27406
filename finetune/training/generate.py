"""Generate completions in batches (left-padded ``model.generate``), with the encoder of training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from data_templates._segments import Message
from finetune.data.tokens import Encoder
from finetune.training.apart import in_parts
from finetune.training.processes import everyones

BATCH = 32


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion's text, and whether it ends with EOS (or another stop token)."""

    text: str
    stopped: bool


@torch.no_grad()
def reply_to(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    context: int,
    temperature: float = 0.0,
) -> list[Reply]:
    """Generate a completion of each conversation; results are in the order of the prompts.

    Args:
        model: a causal model, with or without an adapter.
        encoder: template and tokenizer of its training.
        prompts: conversations that end with the user's turn.
        max_new_tokens: maximum tokens of a completion, capped at half of the context.
        context: positions for prompt and completion together; a longer prompt loses its oldest tokens.
        temperature: 0 is greedy decoding.
    """
    max_new_tokens = min(max_new_tokens, context // 2)
    encoded = [encoder.encode_prompt(prompt)[-(context - max_new_tokens) :] for prompt in prompts]
    # Batches of similar lengths: less padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    replies: dict[int, Reply] = {}
    training = model.training
    model.eval()
    parted = in_parts(model)
    batches = range(0, len(order), BATCH)
    # With sharded weights each forward pass is a collective: ranks with fewer batches generate dummy ones.
    rounds = max(everyones(len(batches))) if parted else len(batches)
    for part in ([order[start : start + BATCH] for start in batches] + [[]] * rounds)[:rounds]:
        rows = [encoded[index] for index in part] or [encoder.stop_ids[:1]]
        new = _generate(model, encoder, rows, max_new_tokens, temperature, together=parted)
        replies |= {index: _reply(encoder, ids) for index, ids in zip(part, new[: len(part)], strict=True)}
    model.train(training)
    return [replies[index] for index in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    *,
    together: bool,
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    pad = encoder.stop_ids[0]
    device = next(model.parameters()).device
    # Left padding: all prompts end at the same position, where generation starts.
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        eos_token_id=encoder.stop_ids,
        pad_token_id=pad,
    )
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=together
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new


def _reply(encoder: Encoder, ids: list[int]) -> Reply:
    return Reply(encoder.decode_reply(ids), any(token in encoder.stop_ids for token in ids))
