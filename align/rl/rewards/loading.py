"""Load a recipe's rewards: reward models on the policy's base, Python functions from their files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.reward.function_reward import FunctionReward
from align.reward.scorer import TOTAL, load_reward_model
from align.rl.rewards.rewards import ModelReward, Rewards
from align.rl.rewards.settings import RewardsSettings, reward_run_folder
from finetune.data.row_columns import RowColumns
from finetune.library_internals import base_quantization
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import read_finished_record, repeat_repair
from finetune.recipe.user_arguments import RowFunction, column_problems, default_notes
from finetune.recipe.user_function import load_user_function
from finetune.training.save import file_sha256


def load_rewards(
    settings: RewardsSettings,
    *,
    base: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    columns: RowColumns | None = None,
) -> Rewards:
    """Load reward models and reward functions.

    Args:
        settings: the recipe's rewards section.
        base: the policy's base model without an adapter: reward models share its weights, except fully
            fine-tuned ones; None: each loads its own base.
        tokenizer: the policy's tokenizer, for the length penalty.
        columns: columns of the rows, for functions that take them; None: there are no rows.

    Raises:
        UserError: a run is missing, of another stage, or damaged; a function's file is missing, or nothing
            fills one of its parameters.
    """
    functions = _load_functions(settings, columns.names if columns is not None else [])
    runs = reward_runs(settings)
    # A run that gives several scores is loaded once.
    unique_runs = list(dict.fromkeys(runs.values()))
    # All of them before the first model is loaded, so that a damaged run is reported early.
    for run in unique_runs:
        _check_checksums(run)
    sources: list[ModelReward | FunctionReward] = []
    notes: list[str] = []
    for index, source in enumerate(settings.sources):
        if source.function is not None:
            sources.append(functions[index])
            if columns is not None:
                what = f"reward '{source.metric_name}'"
                notes += default_notes(functions[index].function, columns.names, what=what)
        else:
            model_index = unique_runs.index(runs[index])
            sources.append(ModelReward(source.metric_name, source.weight, model_index, source.score or TOTAL))
    return Rewards(
        settings,
        sources,
        models=[load_reward_model(run, base=base) for run in unique_runs],
        unsafe_prompt_fn=load_user_function(settings.unsafe_prompt_fn, where="rewards.unsafe_prompt_fn")
        if settings.unsafe_prompt_fn is not None
        else None,
        tokenizer=tokenizer,
        notes=notes + [note for run in unique_runs if base is not None for note in _storage_notes(run, base)],
        columns=columns if columns is not None else {},
    )


def _load_functions(settings: RewardsSettings, columns: list[str]) -> dict[int, FunctionReward]:
    """Return the reward functions by the index of their source.

    Raises:
        UserError: a file is missing, or nothing fills a parameter.
    """
    functions: dict[int, FunctionReward] = {}
    problems: list[Problem] = []
    for index, source in enumerate(settings.sources):
        if source.function is not None:
            where = f"rewards.sources[{index}].function"
            function = RowFunction(load_user_function(source.function, where=where))
            problems += column_problems(function, columns, where=where)
            functions[index] = FunctionReward(source.metric_name, source.weight, function, kind="reward")
    if problems:
        raise UserError(problems)
    return functions


def reward_runs(settings: RewardsSettings) -> dict[int, Path]:
    """Return the folder of each reward run, by the index of its source.

    Raises:
        UserError: there is no such run.
    """
    return {
        index: reward_run_folder(source, where=f"rewards.sources[{index}].run")
        for index, source in enumerate(settings.sources)
        if source.function is None
    }


def rewards_record(settings: RewardsSettings) -> list[dict[str, Any]]:
    """Return the rewards for run.json: name, weight, and reward run or function."""
    runs = reward_runs(settings)
    entries: list[dict[str, Any]] = []
    for index, source in enumerate(settings.sources):
        entry: dict[str, Any] = {"name": source.metric_name, "weight": source.weight}
        if index in runs:
            record = read_finished_record(runs[index])
            entry |= {"run": str(runs[index]), "score": source.score or TOTAL}
            entry |= {key: record[key] for key in ("digest", "files")}
        else:
            entry |= {"function": str(source.function)}
        entries.append(entry)
    return entries


def _check_checksums(run: Path) -> None:
    """Raise UserError if a run's weight files do not match their checksums."""
    record = read_finished_record(run)
    for name, checksum in record["files"].items():
        if file_sha256(run / name) != checksum:
            actual = f"checksum mismatch: {name}"
            repair = repeat_repair(run, record)
            raise UserError(Problem(f"reward run {run}", actual, "the weights as the run saved them", repair))


def _storage_notes(run: Path, base: PreTrainedModel) -> Iterator[str]:
    """Yield a note if a reward model was trained with another precision or quantization of the base."""
    # A fully fine-tuned reward model does not use the policy's base.
    if (run / "model").is_dir():
        return
    saved = read_finished_record(run)["reload"]
    run_storage, base_storage = (saved["precision"], saved["quantization"]), _base_storage(base)
    if run_storage != base_storage:
        trained, loaded = _describe_storage(*run_storage), _describe_storage(*base_storage)
        yield (
            f"{run} was trained on a base in {trained}, the policy's is in {loaded}: scores differ slightly "
            "from those of `llm-align score`"
        )


def _base_storage(base: PreTrainedModel) -> tuple[str, str]:
    """Return a base's precision and quantization, as the recipe writes them."""
    return str(base.dtype).removeprefix("torch."), base_quantization(base)


def _describe_storage(precision: str, quantization: str) -> str:
    return precision if quantization == "none" else f"{quantization} computed in {precision}"
