"""Log-probabilities of fixed labels after prompts; each prompt is computed once, for all labels.

A label is scored with the stop token that ends a reply. Replies that end are disjoint events, also where one
label is a prefix of another, so the sum of its tokens' log-probabilities needs no normalization by length:
log P(label | prompt) = sum_t log p(y_t | prompt, y_<t), with y_T the stop token.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from data_templates.segments import Message
from finetune.data.conversation import with_control_suffix
from finetune.data.tokens import Encoder
from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.classification import label_probabilities
from finetune.generation.sampler import TokenIds, length_batches
from finetune.lm_head import head_positions, logits_at
from finetune.recipe.errors import Problem, UserError

MAX_LOGITS = 2**26
"""Logits of a forward pass over labels: 256 MiB in float32."""


def encode_labels(encoder: Encoder, labels: Sequence[str], prompt: Sequence[Message]) -> list[TokenIds]:
    """Return the tokens of each label as a reply, with the stop token.

    They are the same after every prompt: prompts and replies are tokenized separately.

    Args:
        encoder: template and tokenizer of the model's training.
        labels: the choices.
        prompt: any prompt.

    Raises:
        UserError: two labels have the same tokens.
    """
    prompt_ids = encoder.encode_prompt(prompt)
    asked = with_control_suffix(prompt, encoder.control_suffix)
    label_ids: list[TokenIds] = []
    for label in labels:
        encoded = encoder.encode([*asked, Message("assistant", label)])
        assert encoded.input_ids[: len(prompt_ids)] == prompt_ids, "a reply changes the tokens of its prompt"
        # What follows the last token with loss is the template's, such as a line feed.
        end = max(index for index, has_loss in enumerate(encoded.loss_mask) if has_loss) + 1
        label_ids.append(encoded.input_ids[len(prompt_ids) : end])
    keys = [tuple(ids) for ids in label_ids]
    for index, key in enumerate(keys):
        if (first := keys.index(key)) != index:
            actual = f"'{labels[first]}' and '{labels[index]}' have the same tokens"
            raise UserError(Problem("choices", actual, "labels that the tokenizer tells apart"))
    return label_ids


@dataclass(frozen=True)
class LabelClassifier:
    """Classifies prompts with a generative model.

    Attributes:
        model: a causal model in any wrapper.
        label_ids: tokens of each choice, with the stop token.
        context: positions for prompt and label together; a longer prompt loses its oldest tokens.
        tokens_per_batch: approximate maximum of cached tokens.
    """

    model: nn.Module
    label_ids: Sequence[TokenIds]
    context: int
    tokens_per_batch: int

    def probabilities(self, prompts: Sequence[TokenIds]) -> FloatArray:
        """Return P(label | prompt, one of the labels), (N, L)."""
        limit = self.context - max(map(len, self.label_ids))
        logps_NL = label_logps(
            self.model,
            [ids[-limit:] for ids in prompts],
            self.label_ids,
            tokens_per_batch=self.tokens_per_batch,
        )
        return label_probabilities(logps_NL.numpy().astype(np.float64))


def label_logps(
    model: nn.Module, prompts: Sequence[TokenIds], labels: Sequence[TokenIds], *, tokens_per_batch: int
) -> Tensor:
    """Return log P(label | prompt) of every label after every prompt; see ``choice_logps``.

    Args:
        model: a causal model in any wrapper; dropout is off.
        prompts: token ids, N of them; none is empty.
        labels: token ids, L of them, each with its stop token.
        tokens_per_batch: approximate maximum of cached tokens, those of a prompt once for each label.

    Returns:
        (N, L) in float32, on the CPU.
    """
    rows = choice_logps(model, prompts, [labels] * len(prompts), tokens_per_batch=tokens_per_batch)
    return torch.stack(rows)


@torch.no_grad()
def choice_logps(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    choices: Sequence[Sequence[TokenIds]],
    *,
    tokens_per_batch: int,
) -> list[Tensor]:
    """Return log P(choice | prompt) of each prompt's own choices.

    A prompt's keys and values are computed once and repeated for its choices. A model that caches something
    else (a recurrent state) gets a row per prompt and choice instead.

    Args:
        model: a causal model in any wrapper; dropout is off.
        prompts: token ids, N of them; none is empty.
        choices: token ids of the choices of each prompt, none of them empty.
        tokens_per_batch: approximate maximum of cached tokens, those of a prompt once for each choice.

    Returns:
        N tensors of shape (number of the prompt's choices,) in float32, on the CPU.
    """
    # Budget for all choices at once: few passes over many choices are faster than the other way round.
    batches = length_batches(
        [(len(prompt) + max(map(len, own))) * len(own) for prompt, own in zip(prompts, choices, strict=True)],
        max_new_tokens=0,
        tokens_per_batch=tokens_per_batch,
    )
    logps_of: dict[int, Tensor] = {}
    training = model.training
    model.eval()
    for rows in batches:
        own_prompts, own_choices = [prompts[row] for row in rows], [choices[row] for row in rows]
        logps_C = _shared_prompt_logps(model, own_prompts, own_choices, tokens_per_batch)
        if logps_C is None:
            logps_C = separate_logps(model, own_prompts, own_choices, tokens_per_batch=tokens_per_batch)
        parts = torch.split(logps_C, [len(own) for own in own_choices])
        logps_of |= dict(zip(rows, parts, strict=True))
    model.train(training)
    return [logps_of[row] for row in range(len(prompts))]


def _shared_prompt_logps(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    choices: Sequence[Sequence[TokenIds]],
    tokens_per_batch: int,
) -> Tensor | None:
    """Return log P(choice | prompt) from cached prompts, (C,), prompt by prompt.

    None if the model cannot be continued so.
    """
    base = _unwrapped(model)
    # The last token is not cached: it is the first input of each choice, and predicts its first token.
    lengths = [len(prompt) - 1 for prompt in prompts]
    if min(lengths) == 0 or "position_ids" not in signature(base.forward).parameters:
        return None
    device = next(model.parameters()).device
    ids_BT, mask_BT = _right_padded([prompt[:-1] for prompt in prompts], device)
    with head_positions(base.get_output_embeddings(), torch.zeros_like(ids_BT, dtype=torch.bool)):
        # Models without a cache, such as GPT-1, return no such field.
        cache = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True).get("past_key_values")
    pairs = _pairs(choices)
    longest = max(len(choice) for _, choice in pairs)
    if not _is_continuable(cache, longest, equal_lengths=len(set(lengths)) == 1):
        return None
    num_virtual = cache.get_seq_length() - ids_BT.shape[1]
    # All tokens attend to the virtual ones of a prompt adapter, which come first.
    mask_BT = torch.cat([mask_BT.new_ones(len(prompts), num_virtual), mask_BT], dim=1)
    starts_B = torch.tensor(lengths, device=device) + num_virtual
    cached_per_pair = cache.get_seq_length() + longest
    chunk_size = max(1, min(MAX_LOGITS // (longest * _vocab_size(base)), tokens_per_batch // cached_per_pair))
    chunks = []
    for start in range(0, len(pairs), chunk_size):
        chunk = pairs[start : start + chunk_size]
        row_ids, row_mask = _right_padded([[prompts[i][-1], *choice[:-1]] for i, choice in chunk], device)
        positions = torch.arange(row_ids.shape[1], device=device)
        indices_C = torch.tensor([i for i, _ in chunk], device=device)
        # The base itself: the cache has what a prompt adapter adds, and other adapters are inside its layers.
        logits = base(
            input_ids=row_ids,
            attention_mask=torch.cat([mask_BT[indices_C], row_mask], dim=1),
            position_ids=starts_B[indices_C][:, None] + positions,
            past_key_values=_selected(cache, indices_C),
            use_cache=True,
        ).logits
        targets, _ = _right_padded([choice for _, choice in chunk], device)
        chunks.append((_gather_logps(logits, targets) * row_mask).sum(-1).cpu())
    return torch.cat(chunks)


def separate_logps(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    choices: Sequence[Sequence[TokenIds]],
    *,
    tokens_per_batch: int,
) -> Tensor:
    """Return log P(choice | prompt), (C,) prompt by prompt, from a row for each prompt and choice.

    For any causal model.
    """
    base = _unwrapped(model)
    head, device = base.get_output_embeddings(), next(model.parameters()).device
    pairs = [(prompts[index], choice) for index, choice in _pairs(choices)]
    longest_row = max(len(prompt) + len(choice) for prompt, choice in pairs)
    logits_per_row = max(len(choice) for _, choice in pairs) * _vocab_size(base)
    chunk_size = max(1, min(tokens_per_batch // longest_row, MAX_LOGITS // logits_per_row))
    logps: list[Tensor] = []
    for start in range(0, len(pairs), chunk_size):
        chunk = pairs[start : start + chunk_size]
        ids_BT, mask_BT = _right_padded([[*prompt, *choice[:-1]] for prompt, choice in chunk], device)
        predicting_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
        for row, (prompt, choice) in enumerate(chunk):
            predicting_BT[row, len(prompt) - 1 : len(prompt) + len(choice) - 1] = True
        logits_NV = logits_at(model, head, {"input_ids": ids_BT, "attention_mask": mask_BT}, predicting_BT)
        targets_N = torch.tensor([token for _, choice in chunk for token in choice], device=device)
        sizes = [len(choice) for _, choice in chunk]
        logps += [part.sum() for part in torch.split(_gather_logps(logits_NV, targets_N), sizes)]
    return torch.stack(logps).cpu()


def _pairs(choices: Sequence[Sequence[TokenIds]]) -> list[tuple[int, TokenIds]]:
    """Return (index of the prompt, choice) of every choice, prompt by prompt."""
    return [(index, choice) for index, own in enumerate(choices) for choice in own]


def _is_continuable(cache: object, longest: int, *, equal_lengths: bool) -> bool:
    """Return whether cached prompts can be repeated and continued after padding."""
    if not isinstance(cache, DynamicCache):
        return False
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return False
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    # Padding takes places of a window that is full.
    return equal_lengths or not windows or cache.get_seq_length() + longest <= min(windows)


def _selected(cache: DynamicCache, indices: Tensor) -> DynamicCache:
    """Return a copy with the rows at these indices; the cache is left as it is, and the copy may grow."""
    selected = copy(cache)
    # `batch_select_indices` replaces the tensors of a layer and changes none.
    selected.layers = [copy(layer) for layer in cache.layers]
    selected.batch_select_indices(indices)
    return selected


def _right_padded(rows: Sequence[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, (B, T); padding repeats no row's tokens and is masked."""
    width = max(map(len, rows))
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _gather_logps(logits: Tensor, targets: Tensor) -> Tensor:
    # In bfloat16 the differences of log-probabilities would be rounding noise.
    logits = logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _vocab_size(base: PreTrainedModel) -> int:
    size: int = base.config.get_text_config().vocab_size
    return size
