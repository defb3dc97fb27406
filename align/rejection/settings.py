"""Recipe of stage rejection: its sections, and the checks across them."""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem
from finetune.recipe.settings import PositiveInt, Section, StageSettings


class RejectionSettings(Section):
    """Rejection sampling: rounds, completions per prompt, selection."""

    rounds: PositiveInt = Field(
        1,
        description="rounds of sampling from the current policy and fine-tuning on the best completions",
    )
    prompts: PositiveInt | None = Field(
        None, description="prompts per round, consecutive slices of one shuffle; null: all"
    )
    # RAFT (arXiv 2304.06767) samples 8 to 32; Llama 2 (arXiv 2307.09288), figure 7, 10 to 100.
    num_generations: Annotated[int, Field(ge=2)] = Field(8, description="completions per prompt (n)")
    # best_of_n: Llama 2, section 3.2.3, and RAFT; top_fraction: RAFT's first version (arXiv 2304.06767v1).
    keep: Literal["best_of_n", "top_fraction"] = Field(
        "best_of_n",
        description="best_of_n: the best completion of each prompt; top_fraction: the best of all in a round",
    )
    top_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="for keep: top_fraction: fraction of all completions; null: 1 / num_generations"
    )
    # ReST (arXiv 2308.08998), section 3.
    min_reward: float | None = Field(
        None, description="train only on completions with a reward above this; null: no minimum"
    )
    truncated: Literal["drop", "train"] = Field(
        "drop", description="completions cut off at sampling.max_new_tokens: drop, or train on them too"
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3: with the last round alone, some abilities were forgotten.
    accumulate_rounds: bool = Field(
        True, description="also train on the completions of earlier rounds; false: the last round only"
    )


class Settings(StageSettings):
    """Prompts, rewards, sampling and selection; ``train`` applies to each round."""

    data: PromptSettings = PromptSettings()
    rewards: RewardsSettings = RewardsSettings()
    sampling: SamplingSettings = SamplingSettings()
    rejection: RejectionSettings = RejectionSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return every problem that can be found before anything is loaded."""
        problems = self.rewards.problems(self, valid)
        if "train" in valid and self.train.evaluate_every is not None:
            actual, expected = (
                f"{self.train.evaluate_every}",
                "null: evaluation runs after each round",
            )
            problems.append(Problem("train.evaluate_every", actual, expected, "train.evaluate_every=null"))
        if "data" in valid and self.data.overflow == "truncate":
            expected = "drop: training rows hold the complete prompt with its completion"
            problems.append(Problem("data.overflow", "'truncate'", expected, "data.overflow=drop"))
        if "evaluate" in valid and self.evaluate.exact_match:
            actual = f"{self.evaluate.exact_match}"
            expected = "0: prompts have no reference reply (use evaluate.retention for rows that have)"
            problems.append(Problem("evaluate.exact_match", actual, expected, "evaluate.exact_match=0"))
        if "rejection" in valid:
            problems += _selection_problems(self.rejection)
        if {"rejection", "adapter"} <= set(valid):
            problems += _round_problems(self)
        return problems


def _selection_problems(rejection: RejectionSettings) -> Iterator[Problem]:
    if rejection.top_fraction is not None and rejection.keep == "best_of_n":
        actual = f"{rejection.top_fraction:g} with rejection.keep=best_of_n"
        yield Problem(
            "rejection.top_fraction",
            actual,
            "null: best_of_n selects one per prompt",
            "rejection.keep=top_fraction",
        )


def _round_problems(settings: Settings) -> Iterator[Problem]:
    method = settings.adapter.method
    continues_as = adapter_traits(method).continues_as
    if settings.rejection.rounds > 1 and continues_as:
        actual = (
            f"{settings.rejection.rounds} with adapter.method '{method}', which continues as '{continues_as}'"
        )
        repair = f"adapter.method={continues_as}, or one round, then another run --from this one"
        yield Problem("rejection.rounds", actual, "1 for this adapter", repair)
