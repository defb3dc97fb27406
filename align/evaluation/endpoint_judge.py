"""A model at an OpenAI-compatible endpoint as a judge of pairs."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from align.evaluation.judges import VERDICTS, Judgment, Pair, Progress, Verdict, conversation_text
from data_templates.segments import Message, lift_thought
from finetune.endpoint.client import EndpointClient
from finetune.endpoint.messages import ChatRequest, EndpointAnswer
from finetune.recipe import yaml_file
from finetune.recipe.discovery import local_path
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, SettingError, UserError
from finetune.recipe.settings import NonEmptyStr, Section

PROMPT_FILE = "recipes/prompts/judge-pair.yaml"
FIELDS = ("prompt", "completion_a", "completion_b")
PAIRS_PER_WINDOW = 64
"""Pairs that are judged before the unusable ones are counted: a judge that cannot judge costs no more."""
MIN_PAIRS = 10
"""Pairs from which on a share of unusable ones is an error before all are judged."""
SHOWN_CHARACTERS = 80


class JudgePrompt(Section):
    """The prompt of a judge, and the pattern of its answers."""

    system: str | None = Field(None, description="system prompt")
    user: NonEmptyStr = Field(description="user turn, with {prompt}, {completion_a} and {completion_b}")
    retry: NonEmptyStr = Field(description="added to the user turn after an answer without a verdict")
    pattern: NonEmptyStr = Field(
        description="regular expression of a complete answer; its first group is A, B or tie"
    )

    @field_validator("user", mode="after")
    @classmethod
    def _check_fields(cls, user: str) -> str:
        if missing := [name for name in FIELDS if f"{{{name}}}" not in user]:
            raise SettingError(
                f"without {{{missing[0]}}}", "a text with " + ", ".join(f"{{{name}}}" for name in FIELDS)
            )
        return user

    @field_validator("pattern", mode="after")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise SettingError(
                f"no regular expression: {error}", r"a pattern such as \s*(A|B|tie)\s*"
            ) from error
        if not groups:
            raise SettingError("a pattern without a group", r"a pattern such as \s*(A|B|tie)\s*")
        return pattern

    def messages(self, pair: Pair, *, retry: bool = False) -> list[Message]:
        """Return the conversation that asks for the better completion of a pair."""
        values = {
            "prompt": conversation_text(pair.prompt),
            "completion_a": pair.completion_a,
            "completion_b": pair.completion_b,
        }
        # In one pass: a completion may contain {prompt} itself.
        text = re.sub(rf"\{{({'|'.join(FIELDS)})\}}", lambda match: values[match[1]], self.user)
        if retry:
            text = f"{text}\n\n{self.retry}"
        return [*([Message("system", self.system)] if self.system else []), Message("user", text)]

    def read_verdict(self, answer: EndpointAnswer) -> Verdict | None:
        """Return the verdict of an answer, None if the pattern does not match all of it."""
        # Some servers leave a reasoning model's thought in the text.
        text = lift_thought(Message("assistant", answer.text)).content
        match = re.fullmatch(self.pattern, text, re.IGNORECASE)
        if match is None or match[1] is None:
            return None
        return next((verdict for verdict in VERDICTS if verdict.lower() == match[1].lower()), None)


def read_judge_prompt(file: str, *, where: str = "judge.prompt") -> JudgePrompt:
    """Read the prompt of a judge from a YAML file.

    Raises:
        UserError: there is no such file, or it has errors; all of them at once.
    """
    path = local_path(file)
    if path is None or not path.is_file():
        expected = f"a YAML file such as {PROMPT_FILE}"
        raise UserError(Problem(where, f"no such file: {file}", expected, f"relative to {Path.cwd()}"))
    try:
        return JudgePrompt(**yaml_file.read_yaml(path)[0])
    except ValidationError as error:
        raise UserError(validation_problems(str(path), error, model=JudgePrompt)) from error


class EndpointJudge:
    """Asks a model which of two completions is better, in both orders."""

    def __init__(
        self, client: EndpointClient, prompt: JudgePrompt, *, max_tokens: int, seed: int, max_unusable: float
    ) -> None:
        """Keep what decides the judgments.

        Args:
            client: of the model.
            prompt: of the judge.
            max_tokens: maximum length of an answer.
            seed: of the answers.
            max_unusable: largest accepted fraction of pairs without a usable judgment.
        """
        self.client, self.prompt = client, prompt
        self.max_tokens, self.seed, self.max_unusable = max_tokens, seed, max_unusable

    @property
    def label(self) -> str:
        """Return the model's name for people."""
        return f"{self.client.settings.model} at {self.client.settings.url}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return model, prompt and sampling."""
        digest = hashlib.sha256(self.prompt.model_dump_json().encode()).hexdigest()
        return {**self.client.identity, "prompt": digest, "max_tokens": self.max_tokens, "seed": self.seed}

    def compare(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Judgment]:
        """Return the judgment of each pair; answers are cached.

        Raises:
            UserError: the endpoint fails, its budget is used up, or too many answers are unusable.
        """
        judgments: list[Judgment] = []
        for start in range(0, len(pairs), PAIRS_PER_WINDOW):
            judgments += self._compare(pairs[start : start + PAIRS_PER_WINDOW])
            self._check_usable(judgments, is_complete=len(judgments) == len(pairs))
            if progress is not None:
                progress(len(judgments), len(pairs))
        return judgments

    def _compare(self, pairs: Sequence[Pair]) -> list[Judgment]:
        shown = [order for pair in pairs for order in (pair, pair.swapped)]
        answers = self._ask(shown, retry=False)
        verdicts = [self.prompt.read_verdict(answer) for answer in answers]
        failed = [index for index, verdict in enumerate(verdicts) if verdict is None]
        for index, answer in zip(
            failed, self._ask([shown[index] for index in failed], retry=True), strict=True
        ):
            answers[index], verdicts[index] = answer, self.prompt.read_verdict(answer)
        return [
            Judgment.of_orders(
                verdicts[index],
                verdicts[index + 1],
                {"answers": [answers[index].text, answers[index + 1].text]},
            )
            for index in range(0, len(shown), 2)
        ]

    def _ask(self, pairs: Sequence[Pair], *, retry: bool) -> list[EndpointAnswer]:
        return self.client.chat_many(
            [
                ChatRequest(
                    self.prompt.messages(pair, retry=retry), max_tokens=self.max_tokens, seed=self.seed
                )
                for pair in pairs
            ]
        )

    def _check_usable(self, judgments: Sequence[Judgment], *, is_complete: bool) -> None:
        unusable = [judgment for judgment in judgments if judgment.verdict is None]
        if len(unusable) <= self.max_unusable * len(judgments) or not (
            is_complete or len(judgments) >= MIN_PAIRS
        ):
            return
        first = unusable[0]
        assert first.by_order is not None
        text = first.evidence["answers"][first.by_order.index(None)]
        actual = f"{len(unusable):,} of {len(judgments):,} pairs have no usable judgment"
        actual += f"; the first answer without a verdict is {text[:SHOWN_CHARACTERS]!r}"
        expected = (
            f"answers that match the pattern {self.prompt.pattern!r}; at most {self.max_unusable:.0%} others"
        )
        repair = "use a larger model, raise judge.max_tokens for one that reasons, or change judge.prompt"
        raise UserError(Problem(f"judge {self.label}", actual, expected, repair))
