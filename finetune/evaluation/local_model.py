"""A loaded model under evaluation: completions with its template, log-probabilities of choices and texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from data_templates.segments import Message, TemplateError
from finetune.data.conversation import with_control_suffix
from finetune.data.rows import first_problems
from finetune.evaluation.answers import ChoiceAnswer, CompletionAnswer, Sampling, TextAnswer, Turns
from finetune.generation.label_likelihoods import choice_logps
from finetune.generation.sampler import Decoding, TokenIds
from finetune.recipe.errors import Problem, UserError
from finetune.training.generation import generation_tokens, model_sampler
from finetune.training.loaded_model import LoadedModel

MAX_WINDOW = 2048
"""Tokens of a window of a long text: the logits of a window are in memory at once."""


@dataclass(frozen=True)
class LocalModel:
    """A model in this process, which is loaded when the first answer is not in the cache.

    Attributes:
        load: loads model, tokenizer and template.
        label: its name for people.
        identity: what decides its answers.
    """

    load: Callable[[], LoadedModel]
    label: str
    identity: Mapping[str, Any]

    @cached_property
    def loaded(self) -> LoadedModel:
        """Return model, tokenizer and template."""
        return self.load()

    def complete(self, prompts: Sequence[Turns], sampling: Sampling) -> list[CompletionAnswer]:
        """Return a completion of each prompt; see ``EvalModel.complete``."""
        loaded = self.loaded
        # Half of the context at least is left to the prompt.
        max_new_tokens = min(sampling.max_new_tokens, loaded.context // 2)
        sampled = model_sampler(loaded.model, loaded.encoder).sample(
            [ids[-(loaded.context - max_new_tokens) :] for ids in self._encode_prompts(prompts)],
            Decoding(max_new_tokens, sampling.temperature, sampling.seed),
            streams=sampling.streams,
        )
        return [
            CompletionAnswer(loaded.encoder.decode_reply(completion.ids), completion.ended_with_eos)
            for completion in sampled
        ]

    def choose(self, questions: Sequence[tuple[Turns, Sequence[str]]], *, style: str) -> list[ChoiceAnswer]:
        """Return the log-probabilities of each question's choices; see ``EvalModel.choose``."""
        encode = self._encode_text_choices if style == "text" else self._encode_chat_choices
        encoded = [encode(turns, choices) for turns, choices in questions]
        longest = [max(map(len, choices)) for _, choices in encoded]
        logps = choice_logps(
            self.loaded.model,
            [
                prompt[-max(1, self.loaded.context - length) :]
                for (prompt, _), length in zip(encoded, longest, strict=True)
            ],
            [choices for _, choices in encoded],
            tokens_per_batch=self._tokens_per_batch,
        )
        return [
            # Blanks that separate a choice from its context are no text of the choice.
            ChoiceAnswer(
                tuple(row.tolist()), tuple(max(1, len(choice.strip().encode())) for choice in choices)
            )
            for row, (_, choices) in zip(logps, questions, strict=True)
        ]

    def read(self, texts: Sequence[str]) -> list[TextAnswer]:
        """Return the log-probability of each text; see ``EvalModel.read``.

        A long text is read in windows that overlap by half: each token is predicted once, from half of a
        window at least.
        """
        tokenizer = self.loaded.encoder.tokenizer
        windows: list[tuple[TokenIds, TokenIds]] = []
        text_indices: list[int] = []
        start = _with_start(tokenizer, "")
        ids_of = [[*start, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
        for index, ids in enumerate(ids_of):
            for window in _windows(ids, min(self.loaded.context, MAX_WINDOW)):
                windows.append(window)
                text_indices.append(index)
        logps = choice_logps(
            self.loaded.model,
            [prompt for prompt, _ in windows],
            [[predicted] for _, predicted in windows],
            tokens_per_batch=self._tokens_per_batch,
        )
        sums = torch.zeros(len(texts), dtype=torch.float64)
        sums.index_add_(
            0, torch.tensor(text_indices, dtype=torch.long), torch.cat([torch.zeros(0), *logps]).double()
        )
        return [
            TextAnswer(float(logp), len(ids) - 1, len(text.encode()))
            for logp, ids, text in zip(sums, ids_of, texts, strict=True)
        ]

    @property
    def _tokens_per_batch(self) -> int:
        return generation_tokens(next(self.loaded.model.parameters()).device)

    def _encode_prompts(self, prompts: Sequence[Turns]) -> list[list[int]]:
        encoder = self.loaded.encoder
        controlled = [with_control_suffix(prompt, encoder.control_suffix) for prompt in prompts]
        encoded, problems = [], []
        for prompt, result in zip(prompts, encoder.encode_many(controlled), strict=True):
            if isinstance(result, TemplateError):
                expected = f"a prompt for template {encoder.name}"
                problems.append(Problem(f"prompt {prompt[-1].content!r:.60}", str(result), expected))
            else:
                encoded.append(result.input_ids)
        if problems:
            raise UserError(first_problems(problems, len(prompts)))
        return encoded

    def _encode_chat_choices(self, turns: Turns, choices: Sequence[str]) -> tuple[TokenIds, list[TokenIds]]:
        """Return the prompt's tokens and those of each choice as a reply, with its stop token."""
        encoder = self.loaded.encoder
        [prompt_ids] = self._encode_prompts([turns])
        asked = with_control_suffix(turns, encoder.control_suffix)
        replies: list[TokenIds] = []
        for choice in choices:
            encoded = encoder.encode([*asked, Message("assistant", choice)])
            # What follows the last token with loss is the template's, such as a line feed.
            end = max(index for index, has_loss in enumerate(encoded.loss_mask) if has_loss) + 1
            replies.append(encoded.input_ids[len(prompt_ids) : end])
        return prompt_ids, replies

    def _encode_text_choices(self, turns: Turns, choices: Sequence[str]) -> tuple[TokenIds, list[TokenIds]]:
        """Return the context's tokens and those of each continuation, without a template.

        Context and continuation are tokenized together, as the model would read them.
        """
        tokenizer = self.loaded.encoder.tokenizer
        context = "".join(turn.content for turn in turns)
        context_ids = _with_start(tokenizer, context)
        start = context_ids[: len(context_ids) - len(tokenizer.encode(context, add_special_tokens=False))]
        rows: list[TokenIds] = [
            [*start, *tokenizer.encode(context + choice, add_special_tokens=False)][len(context_ids) :]
            for choice in choices
        ]
        if not all(rows):
            actual = f"a choice adds no token to its context: {choices!r:.80}"
            raise UserError(Problem("choices", actual, "choices that the tokenizer tells apart"))
        return context_ids, rows


def _with_start(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, after a first one to predict from where it has none.

    BOS comes first if the tokenizer adds it by itself, or if the text is empty: then there must be a token,
    and models without BOS have the end-of-text token between documents.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
    if adds_bos or not text:
        return [bos if bos is not None else tokenizer.eos_token_id, *ids]
    return ids


def _windows(ids: list[int], context: int) -> list[tuple[TokenIds, TokenIds]]:
    """Return (tokens to condition on, tokens to predict) that cover all tokens but the first once.

    >>> _windows([0, 1, 2, 3, 4, 5], 4)
    [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    windows: list[tuple[TokenIds, TokenIds]] = []
    start = 1
    while start < len(ids):
        begin = 0 if start == 1 else max(0, start - context // 2)
        end = min(len(ids), begin + context)
        windows.append((ids[begin:start], ids[start:end]))
        start = end
    return windows
