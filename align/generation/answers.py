"""Answer rows with a loaded model: completions, or labels with their probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.generation.prompt_file import PromptRow
from align.generation.settings import GenerateSettings
from data_templates.segments import TemplateError
from finetune.data.conversation import with_control_suffix
from finetune.data.rows import first_problems
from finetune.generation.label_likelihoods import LabelClassifier, encode_labels
from finetune.generation.sampler import Decoding
from finetune.recipe.errors import Problem, UserError
from finetune.training.generation import generation_tokens, model_sampler
from finetune.training.loaded_model import LoadedModel

PROBABILITY_DIGITS = 6
NumberedRows = Sequence[tuple[int, PromptRow]]


@dataclass(frozen=True)
class Answerer:
    """Answers rows with a loaded model."""

    loaded: LoadedModel
    settings: GenerateSettings

    def answer(self, rows: NumberedRows) -> list[dict[str, Any]]:
        """Return the results of rows that have a prompt."""
        prompts = self._encode(rows)
        if self.settings.choices is None:
            return self._complete(prompts, [number for number, _ in rows])
        return self._classify(prompts, self.settings.choices, rows[0][1])

    def _encode(self, rows: NumberedRows) -> list[list[int]]:
        encoder = self.loaded.encoder
        prompts = [with_control_suffix(row.prompt or (), encoder.control_suffix) for _, row in rows]
        encoded, problems = [], []
        for (_, row), result in zip(rows, encoder.encode_many(prompts), strict=True):
            if isinstance(result, TemplateError):
                expected = f"a prompt for template {encoder.name}"
                problems.append(Problem(row.location, str(result), expected))
            else:
                encoded.append(result.input_ids)
        if problems:
            raise UserError(first_problems(problems, len(rows)))
        return encoded

    def _complete(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[dict[str, Any]]:
        loaded, settings = self.loaded, self.settings
        max_new_tokens = min(settings.max_new_tokens, loaded.context // 2)
        completions = model_sampler(loaded.model, loaded.encoder).sample(
            [ids[-(loaded.context - max_new_tokens) :] for ids in prompts],
            Decoding(max_new_tokens, settings.temperature, settings.seed),
            streams=numbers,
        )
        texts = [loaded.encoder.decode_reply(completion.ids) for completion in completions]
        return [
            {"completion": text, "finish_reason": completion.finish_reason}
            for text, completion in zip(texts, completions, strict=True)
        ]

    def _classify(
        self, prompts: Sequence[list[int]], choices: Sequence[str], example: PromptRow
    ) -> list[dict[str, Any]]:
        loaded = self.loaded
        label_ids = encode_labels(loaded.encoder, choices, example.prompt or ())
        budget = generation_tokens(next(loaded.model.parameters()).device)
        classifier = LabelClassifier(loaded.model, label_ids, loaded.context, budget)
        return [
            {
                "label": choices[int(probabilities_L.argmax())],
                "probabilities": {
                    label: round(float(value), PROBABILITY_DIGITS)
                    for label, value in zip(choices, probabilities_L, strict=True)
                },
            }
            for probabilities_L in classifier.probabilities(prompts)
        ]
