"""Recipe of stage rejection: its sections, and its rules."""

from typing import Annotated, Literal

from pydantic import Field

from align.rl.rewards.settings import REWARD_RULES
from align.rl.settings import RLSettings
from finetune.recipe.compatibility import Rule, is_set
from finetune.recipe.errors import Problem
from finetune.recipe.settings import AtLeastTwo, FiniteFloat, PositiveInt, Section


class RejectionSettings(Section):
    """Rejection sampling: rounds, completions per prompt, selection."""

    rounds: PositiveInt = Field(
        1,
        description="rounds of sampling from the current policy and fine-tuning on the best completions",
    )
    prompts: PositiveInt | None = Field(
        None, description="prompts per round, in consecutive slices of one shuffle; null: all"
    )
    # RAFT (arXiv 2304.06767) samples 8 to 32; Llama 2 (arXiv 2307.09288), figure 7, 10 to 100.
    num_generations: AtLeastTwo = Field(8, description="completions per prompt (n)")
    # best_of_n: Llama 2, section 3.2.3, and RAFT; top_fraction: RAFT's first version (arXiv 2304.06767v1).
    keep: Literal["best_of_n", "top_fraction"] = Field(
        "best_of_n",
        description="best_of_n: the best completion of each prompt; top_fraction: the best ones of a round",
    )
    top_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="for keep: top_fraction: fraction of all completions; null: 1 / num_generations"
    )
    # ReST (arXiv 2308.08998), section 3.
    min_reward: FiniteFloat | None = Field(
        None, description="train only on completions with a reward above this; null: no minimum"
    )
    truncated: Literal["drop", "train"] = Field(
        "drop", description="completions cut off at sampling.max_new_tokens: drop, or train on them too"
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3: with the last round alone, some abilities were forgotten.
    accumulate_rounds: bool = Field(
        True, description="also train on the completions of earlier rounds; false: the last round only"
    )


class Settings(RLSettings):
    """Prompts, rewards, sampling and selection; ``train`` applies to each round."""

    rejection: RejectionSettings = RejectionSettings()


RULES = (
    *REWARD_RULES,
    Rule(
        "rejection-evaluate-every",
        {"train.evaluate_every": is_set},
        source="align/rejection/rounds.py",
        problem=Problem(
            "train.evaluate_every",
            "{train.evaluate_every}",
            "null: evaluation runs after each round",
            "train.evaluate_every=null",
        ),
    ),
    Rule(
        "rejection-overflow",
        {"data.overflow": ("truncate",)},
        source="arXiv 2304.06767, section 3: completions of the full prompt",
        problem=Problem(
            "data.overflow",
            "'truncate'",
            "drop: training rows have the complete prompt with its completion",
            "data.overflow=drop",
        ),
    ),
    Rule(
        "rejection-exact-match",
        {"evaluate.exact_match": bool},
        source="align/rl/prompts.py: prompts without reference answers",
        problem=Problem(
            "evaluate.exact_match",
            "{evaluate.exact_match}",
            "0: prompts have no reference reply (use evaluate.retention for rows with one)",
            "evaluate.exact_match=0",
        ),
    ),
    Rule(
        "top-fraction",
        {"rejection.top_fraction": is_set, "rejection.keep": ("best_of_n",)},
        source="arXiv 2304.06767v1: the best fraction of all completions",
        problem=Problem(
            "rejection.top_fraction",
            "{rejection.top_fraction:g} with rejection.keep=best_of_n",
            "null: best_of_n selects one per prompt",
            "rejection.keep=top_fraction",
        ),
    ),
    Rule(
        "rejection-rounds",
        {"rejection.rounds": lambda rounds: rounds > 1, "traits.continues_as": bool},
        source="finetune/adapters/*.py, TRAITS.continues_as",
        problem=Problem(
            "rejection.rounds",
            "{rejection.rounds} with adapter.method '{adapter.method}', which continues as "
            "'{traits.continues_as}'",
            "1 for this adapter",
            "adapter.method={traits.continues_as}, or one round, then another run --from this one",
        ),
    ),
)
