"""Load a recipe's rewards: reward models on the policy's base, Python functions from their files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.reward.rules import Rule
from align.reward.scorer import TOTAL, load_reward
from align.rl.rewards.rewards import AnswerRule, Learnt, Rewards
from align.rl.rewards.settings import EXPECTED, RewardsSettings, folder_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_function import has_parameter, load_function
from finetune.recipe.runs import finished_record
from finetune.training.save import sha256


def load_rewards(
    settings: RewardsSettings, *, base: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> Rewards:
    """Load reward models and reward functions.

    Args:
        settings: the recipe's rewards section.
        base: the policy's base model without an adapter: reward models share its weights, except fully
            fine-tuned ones; None: each loads its own base.
        tokenizer: the policy's tokenizer, for the length penalty.

    Raises:
        UserError: a run is missing, of another stage, or damaged; a function's file is missing.
    """
    runs = reward_runs(settings)
    # A run that gives several scores is loaded once.
    order = list(dict.fromkeys(runs.values()))
    for run in order:
        _refuse_damaged(run)
    sources: list[Learnt | Rule | AnswerRule] = []
    for index, source in enumerate(settings.sources):
        if source.function is not None:
            function = load_function(source.function, where=f"reward.sources[{index}].function")
            if has_parameter(function, EXPECTED):
                sources.append(AnswerRule(source.called, source.weight, function))
            else:
                sources.append(Rule(source.called, source.weight, function, kind="reward"))
        else:
            number = order.index(runs[index])
            sources.append(Learnt(source.called, source.weight, number, source.score or TOTAL))
    return Rewards(
        settings,
        sources,
        models=[load_reward(run, base=base) for run in order],
        risky=load_function(settings.risky, where="reward.risky") if settings.risky is not None else None,
        tokenizer=tokenizer,
        notes=[note for run in order if base is not None for note in _stored_otherwise(run, base)],
    )


def reward_runs(settings: RewardsSettings) -> dict[int, Path]:
    """Return the folder of each reward run, by the index of its source.

    Raises:
        UserError: there is no such run.
    """
    return {
        index: folder_of(source, where=f"reward.sources[{index}].run")
        for index, source in enumerate(settings.sources)
        if source.function is None
    }


def rewards_record(settings: RewardsSettings) -> list[dict[str, Any]]:
    """Return the rewards for run.json: name, weight, and reward run or function."""
    runs = reward_runs(settings)
    found: list[dict[str, Any]] = []
    for index, source in enumerate(settings.sources):
        facts: dict[str, Any] = {"name": source.called, "weight": source.weight}
        if index in runs:
            record = finished_record(runs[index])
            facts |= {"run": str(runs[index]), "score": source.score or TOTAL}
            facts |= {key: record[key] for key in ("digest", "files")}
        else:
            facts |= {"function": source.function}
        found.append(facts)
    return found


def _refuse_damaged(run: Path) -> None:
    """Raise UserError if a run's weight files do not match their checksums."""
    record = finished_record(run)
    for name, checksum in record["files"].items():
        if sha256(run / name) != checksum:
            found = f"checksum mismatch: {name}"
            repair = f"repeat the run: `{record['command']} --force`"
            raise UserError(Problem(f"reward run {run}", found, "the weights as the run saved them", repair))


def _stored_otherwise(run: Path, base: PreTrainedModel) -> Iterator[str]:
    """Yield a note if a reward model was trained with another precision or quantization of the base."""
    if (run / "model").is_dir():
        return
    load = finished_record(run)["load"]
    theirs, own = (load["precision"], load["quantization"]), _stored(base)
    if theirs != own:
        yield (
            f"{run} was trained on a base in {_shown(*theirs)}, the policy's is in {_shown(*own)}: scores "
            "differ slightly from those of `llm-align score`"
        )


def _stored(base: PreTrainedModel) -> tuple[str, str]:
    """Return a base's precision and quantization, as the recipe writes them."""
    kinds = {"is_loaded_in_4bit": "nf4", "is_loaded_in_8bit": "int8"}
    # transformers sets these attributes on quantized models only.
    stored = next((name for flag, name in kinds.items() if vars(base).get(flag)), "none")
    return str(base.dtype).removeprefix("torch."), stored


def _shown(precision: str, quantization: str) -> str:
    return precision if quantization == "none" else f"{quantization} computed in {precision}"
