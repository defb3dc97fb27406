"""Generate the completions of conversations, with the encoder of training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from data_templates.segments import Message
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import all_gather_object, shard, unshard
from finetune.generation.sampler import Decoding, TransformersSampler
from finetune.training.auto_values import GENERATION_TOKENS
from finetune.training.context import RunContext
from finetune.training.model import Policy, TextEncoding


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
            max_new_tokens=ctx.settings.max_reply_tokens,
            context=text.context,
        )
        return unshard(all_gather_object(completions))


def generate_completions(
    model: nn.Module,
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
        temperature: 0 is greedy decoding; else the seed is drawn from torch's global random state.
    """
    # Half of the context at least is left to the prompt.
    max_new_tokens = min(max_new_tokens, context // 2)
    encoded = [encoder.encode_prompt(prompt)[-(context - max_new_tokens) :] for prompt in prompts]
    seed = int(torch.randint(2**31, ())) if temperature > 0 else 0
    completions = model_sampler(model, encoder).sample(encoded, Decoding(max_new_tokens, temperature, seed))
    return [
        Completion(encoder.decode_reply(completion.ids), completion.ended_with_eos)
        for completion in completions
    ]


def model_sampler(model: nn.Module, encoder: Encoder) -> TransformersSampler:
    """Return a sampler of a model, with the stop tokens of its template and a batch size for its device."""
    tokens_per_batch = generation_tokens(next(model.parameters()).device)
    return TransformersSampler(model, encoder.stop_ids, tokens_per_batch)


def generation_tokens(device: torch.device) -> int:
    """Return the tokens that are generated in parallel on a device."""
    return GENERATION_TOKENS[device.type]
