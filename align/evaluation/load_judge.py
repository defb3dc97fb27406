"""Judges by their settings: a model at an endpoint, a finished reward run, or a Python function."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from align.evaluation.endpoint_judge import PROMPT_FILE, EndpointJudge, read_judge_prompt
from align.evaluation.judges import VERDICTS, Judgment, Pair, PairJudge, Progress, Verdict, conversation_text
from data_templates.segments import Message
from finetune.endpoint.client import EndpointClient
from finetune.endpoint.settings import EndpointSettings, parse_option
from finetune.recipe import yaml_file
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, SettingError, UserError, UserFunctionError
from finetune.recipe.python_function import FunctionName, PythonFunction
from finetune.recipe.runs import find_run, read_finished_record
from finetune.recipe.settings import NonEmptyStr, NonNegativeInt, PositiveInt, Section
from finetune.recipe.user_arguments import (
    ROW_NAMES,
    RowFunction,
    column_problems,
    completion_row,
    missing_value_problems,
    signature_problems,
)
from finetune.recipe.user_function import describe_error, file_digest, load_user_function

if TYPE_CHECKING:
    from align.reward.scorer import RewardModel

KINDS = ("endpoint", "run", "function")
PAIR_NAMES = ("prompt", "completion_a", "completion_b")
VERDICT_FORMAT = "'A', 'B' or 'tie'"
JUDGE_FORMAT = "endpoint=FILE.yaml, run=NAME, function=FILE.py:NAME, or a YAML file with one of these keys"


class JudgeSettings(Section):
    """Who compares two completions: exactly one of endpoint, run and function."""

    model_config = ConfigDict(hide_input_in_errors=True)

    endpoint: EndpointSettings | None = Field(None, description="a model at an OpenAI-compatible endpoint")
    run: NonEmptyStr | None = Field(
        None,
        description="finished run of stage reward: the completion with the higher total reward is better",
    )
    function: FunctionName | None = Field(
        None,
        description="file.py:function of (prompt, completion) that returns a number, or of (prompt, "
        "completion_a, completion_b) that returns 'A', 'B' or 'tie'",
    )
    prompt: NonEmptyStr = Field(PROMPT_FILE, description="YAML file with the prompt of an endpoint's model")
    # One word; a model that reasons in its answer needs hundreds.
    max_tokens: PositiveInt = Field(16, description="maximum length of an endpoint's answer")
    seed: NonNegativeInt = Field(0, description="seed of an endpoint's answers, which are greedy")
    # Our choice: more would let the unusable pairs decide.
    max_unusable: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="fraction of pairs without a usable judgment above which the judge has failed"
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        given = [name for name in KINDS if name in self.model_fields_set and dict(self)[name] is not None]
        if len(given) != 1:
            actual = f"{' and '.join(given) or 'none'} of {', '.join(KINDS)}"
            raise SettingError(actual, "exactly one of them", "judge: {run: NAME}, for example")
        return self


def read_judge(values: Mapping[str, Any], *, where: str = "judge") -> JudgeSettings:
    """Return the settings of a mapping, as a suite file has it.

    Raises:
        UserError: unknown keys, values of the wrong type, or not exactly one judge.
    """
    try:
        return JudgeSettings(**values)
    except ValidationError as error:
        # The cause is left out: pydantic's error object keeps the values, which may be secrets.
        raise UserError(validation_problems(where, error, model=JudgeSettings)) from None


def parse_judge(text: str, *, where: str = "--judge") -> JudgeSettings:
    """Return the settings of a command line option.

    Args:
        text: ``run=NAME``, ``function=FILE.py:NAME``, ``endpoint=`` and a form that ``parse_endpoint`` takes,
            or a YAML file with the settings.
        where: the option, for messages.

    Raises:
        UserError: the text has another format, or settings have errors.
    """
    kind, equals, value = text.strip().partition("=")
    if not equals and kind.endswith((".yaml", ".yml")):
        path = Path(kind).expanduser()
        if not path.is_file():
            raise UserError(Problem(where, f"no such file: {kind}", JUDGE_FORMAT))
        return read_judge(yaml_file.read_yaml(path)[0], where=where)
    if kind not in KINDS or not value:
        raise UserError(Problem(where, "not a judge", JUDGE_FORMAT))
    return read_judge({kind: parse_option(value, where=where) if kind == "endpoint" else value}, where=where)


def load_judge(settings: JudgeSettings, *, where: str = "judge") -> PairJudge:
    """Load the judge of some settings.

    Raises:
        UserError: a file, a run or an API key is missing, or the function takes other parameters.
    """
    if settings.endpoint is not None:
        return EndpointJudge(
            EndpointClient(settings.endpoint),
            read_judge_prompt(settings.prompt, where=f"{where}.prompt"),
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            max_unusable=settings.max_unusable,
        )
    if settings.run is not None:
        from align.reward.scorer import load_reward_model

        run, _ = find_run(settings.run, where=f"{where}.run", recipes=False)
        return RewardRunJudge(run, load_reward_model(run))
    assert settings.function is not None
    return FunctionJudge(settings.function, where=f"{where}.function")


class RewardRunJudge:
    """Prefers the completion with the higher total reward of a finished reward run."""

    def __init__(self, run: Path, model: "RewardModel") -> None:
        self.run, self.model = run, model

    @property
    def label(self) -> str:
        """Return the run's folder for people."""
        return f"reward run {self.run}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return what identifies the run's content."""
        record = read_finished_record(self.run)
        return {"reward_run": record.get("digest", ""), "files": record.get("files", {})}

    def compare(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Judgment]:
        """Return the judgment of each pair; the order of its completions has no influence."""
        from align.reward.scorer import TOTAL

        # Both completions of a pair are consecutive: they share a forward pass.
        conversations = [
            [*pair.prompt, Message("assistant", completion)]
            for pair in pairs
            for completion in (pair.completion_a, pair.completion_b)
        ]
        locations = [
            f"completion {name} of pair {pair.id or number}"
            for number, pair in enumerate(pairs, 1)
            for name in ("A", "B")
        ]
        totals = self.model.score_conversations(conversations, locations)[TOTAL]
        if progress is not None:
            progress(len(pairs), len(pairs))
        return [Judgment.of_scores(totals[i], totals[i + 1]) for i in range(0, len(totals), 2)]


class FunctionJudge:
    """Prefers what a Python function prefers: it scores each completion, or compares the two."""

    def __init__(self, function: str | PythonFunction, *, where: str = "judge.function") -> None:
        """Load the function.

        Raises:
            UserError: the file or the function is missing, or it has parameters that nothing fills.
        """
        self.function = function
        self._where = where
        self._row_function = RowFunction(load_user_function(function, where=where))
        target = self._row_function.function
        self.compares = bool({"completion_a", "completion_b"} & set(self._row_function.parameters))
        problems = (
            signature_problems(target, PAIR_NAMES, where=where)
            if self.compares
            else signature_problems(target, ROW_NAMES, where=where, has_columns=True)
        )
        if problems:
            raise UserError(problems)

    @property
    def label(self) -> str:
        """Return file and function for people."""
        return f"function {self.function}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return a digest of the function's file."""
        return {"function": file_digest(self.function, where=self._where)}

    def compare(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Judgment]:
        """Return the judgment of each pair.

        Raises:
            UserError: the function raised, or returned something else.
        """
        judgments = self._compare_in_both_orders(pairs) if self.compares else self._score(pairs)
        if progress is not None:
            progress(len(pairs), len(pairs))
        return judgments

    def _compare_in_both_orders(self, pairs: Sequence[Pair]) -> list[Judgment]:
        return [
            Judgment.of_orders(self._verdict(pair, number), self._verdict(pair.swapped, number))
            for number, pair in enumerate(pairs, 1)
        ]

    def _score(self, pairs: Sequence[Pair]) -> list[Judgment]:
        from align.reward.function_reward import FunctionReward

        rows = [
            completion_row(
                [*pair.prompt, Message("assistant", completion)],
                f"completion {name} of pair {pair.id or number}",
                reference=pair.reference,
                columns={f"completion {name} of pair {pair.id or number}": pair.columns},
            )
            for number, pair in enumerate(pairs, 1)
            for name, completion in (("A", pair.completion_a), ("B", pair.completion_b))
        ]
        columns = sorted({name for pair in pairs for name in pair.columns})
        problems = column_problems(self._row_function, columns, where=self._where)
        problems = problems or missing_value_problems(self._row_function, rows, where=self._where)
        if problems:
            raise UserError(problems)
        scores = FunctionReward(self._row_function.text, 1.0, self._row_function, kind="judge").scores(rows)
        return [Judgment.of_scores(scores[i], scores[i + 1]) for i in range(0, len(scores), 2)]

    def _verdict(self, pair: Pair, number: int) -> Verdict:
        where = f"{self._where} on pair {pair.id or number}"
        values = {"prompt": conversation_text(pair.prompt), "completion_a": pair.completion_a}
        values |= {"completion_b": pair.completion_b}
        function = self._row_function
        names = PAIR_NAMES if function.takes_all else function.parameters
        try:
            verdict = function.function(**{name: values[name] for name in names if name in values})
        except KeyboardInterrupt:  # the user's second Ctrl-C
            raise
        except BaseException as error:  # the function is the user's and may raise anything, also SystemExit
            raise UserFunctionError(Problem(where, describe_error(error), VERDICT_FORMAT)) from error
        if not isinstance(verdict, str) or verdict not in VERDICTS:
            actual = f"it returned {reprlib.repr(verdict)}"
            repair = "a function that returns a number takes (prompt, completion)"
            raise UserFunctionError(Problem(where, actual, VERDICT_FORMAT, repair))
        return next(known for known in VERDICTS if known == verdict)
