"""The rewards that a recipe names, loaded: reward models on the policy's base, programs from their files."""

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
    """Load reward models and programs.

    Args:
        settings: the recipe's section.
        base: the policy's base in memory, without an adapter: reward models share its weights, but for those
            that tuned a whole model; None: each loads its own.
        tokenizer: the policy's, which counts the tokens of replies.

    Raises:
        UserError: a run is not there, of another stage, or damaged; a program's file is gone.
    """
    runs = reward_runs(settings)
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
    """Return the folders of the reward runs, by the numbers of the sources that name them.

    Raises:
        UserError: there is no such run.
    """
    return {
        index: folder_of(source, where=f"reward.sources[{index}].run")
        for index, source in enumerate(settings.sources)
        if source.function is None
    }


def rewards_record(settings: RewardsSettings) -> list[dict[str, Any]]:
    """Return what run.json says of the rewards: each with its weight, and its run or its program."""
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
    """Raise UserError if the weights of a run are not those that it wrote."""
    record = finished_record(run)
    for name, checksum in record["files"].items():
        if sha256(run / name) != checksum:
            found = f"{name} does not have the checksum it was written with"
            repair = f"`{record['command']} --force` makes the run anew"
            raise UserError(Problem(f"reward run {run}", found, "the weights that the run saved", repair))


def _stored_otherwise(run: Path, base: PreTrainedModel) -> Iterator[str]:
    """Yield a note where a reward model was trained on a base that was stored in another way."""
    if (run / "model").is_dir():
        return
    load = finished_record(run)["load"]
    theirs, own = (load["precision"], load["quantization"]), _stored(base)
    if theirs != own:
        yield (
            f"{run} learnt on a base in {_shown(*theirs)}, and scores on the policy's in {_shown(*own)}: its "
            "scores differ a little from those that `llm-align score` gives"
        )


def _stored(base: PreTrainedModel) -> tuple[str, str]:
    """Return the precision of a base's passes and how its weights are stored, in the recipe's words."""
    kinds = {"is_loaded_in_4bit": "nf4", "is_loaded_in_8bit": "int8"}
    stored = next((name for flag, name in kinds.items() if vars(base).get(flag)), "none")
    return str(base.dtype).removeprefix("torch."), stored


def _shown(precision: str, quantization: str) -> str:
    return precision if quantization == "none" else f"{quantization} computed in {precision}"
