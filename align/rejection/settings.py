"""The sections of a recipe of stage rejection, and what contradicts itself in them."""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Positive, Section, StageSettings


class RejectionSettings(Section):
    """How many replies are drawn, which of them are learnt, and how often this is done."""

    rounds: Positive = Field(
        1,
        description="times that replies are drawn from the policy as it is by then, and the best are learnt",
    )
    prompts: Positive | None = Field(
        None, description="prompts of a round, the next ones in an order by seed; null: all of them"
    )
    # RAFT (arXiv 2304.06767) draws 8 to 32; Llama 2 (arXiv 2307.09288), figure 7, 10 to 100.
    samples: Annotated[int, Field(ge=2)] = Field(8, description="replies drawn for each prompt (n)")
    # best: Llama 2, section 3.2.3, and RAFT; share: the first version of RAFT (arXiv 2304.06767v1).
    keep: Literal["best", "share"] = Field(
        "best", description="best: each prompt's best reply; share: the best of all replies of a round"
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="for keep: share, this part of all replies; null: 1 / samples"
    )
    # ReST (arXiv 2308.08998), section 3.
    above: float | None = Field(
        None, description="only replies with a reward above this are learnt; null: any"
    )
    unfinished: Literal["drop", "learn"] = Field(
        "drop", description="replies that did not end within sampling.max_new_tokens: learnt too, or never"
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3: with the last round's alone, some abilities were forgotten.
    memory: bool = Field(
        True, description="what earlier rounds have chosen is learnt again; false: the last round's alone"
    )


class Settings(StageSettings):
    """Prompts, rewards, how replies are sampled, and which of them are learnt; ``train`` is of each round."""

    data: PromptSettings = PromptSettings()
    reward: RewardsSettings = RewardsSettings()
    sampling: SamplingSettings = SamplingSettings()
    rejection: RejectionSettings = RejectionSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself, before anything is loaded."""
        found = self.reward.problems(self, valid)
        if "train" in valid and self.train.evaluate_every is not None:
            given, expected = (
                f"{self.train.evaluate_every}",
                "null: held-out replies are measured after each round",
            )
            found.append(Problem("train.evaluate_every", given, expected, "train.evaluate_every=null"))
        if "data" in valid and self.data.too_long == "cut":
            expected = "drop: what is learnt is a prompt as it stands, with its reply"
            found.append(Problem("data.too_long", "'cut'", expected, "data.too_long=drop"))
        if "evaluate" in valid and self.evaluate.exact_match:
            given = f"{self.evaluate.exact_match}"
            expected = "0: prompts have no one right reply (evaluate.skill holds what has)"
            found.append(Problem("evaluate.exact_match", given, expected, "evaluate.exact_match=0"))
        if "rejection" in valid:
            found += _choice(self.rejection)
        if {"rejection", "adapter"} <= set(valid):
            found += _rounds(self)
        return found


def _choice(rejection: RejectionSettings) -> Iterator[Problem]:
    if rejection.share is not None and rejection.keep == "best":
        found = f"{rejection.share:g}, and rejection.keep is best"
        yield Problem(
            "rejection.share", found, "null: the best of each prompt is one", "rejection.keep=share"
        )


def _rounds(settings: Settings) -> Iterator[Problem]:
    method = settings.adapter.method
    other = adapter_traits(method).goes_on_as
    if settings.rejection.rounds > 1 and other:
        found = f"{settings.rejection.rounds} with adapter.method '{method}', which goes on as '{other}'"
        repair = f"adapter.method={other}, or one round and then another run --from this one"
        yield Problem("rejection.rounds", found, "1 for this adapter", repair)
