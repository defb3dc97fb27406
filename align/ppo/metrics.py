"""Metrics of PPO: of updates (explained variance, approx_kl), of held-out completions, the first ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from align.ppo.experience import Rollouts
from align.ppo.rollout_order import EVAL_ROLLOUT_INDEX, sampling_seed
from align.ppo.settings import Settings
from align.rl.completions import (
    KeepGraded,
    ScoredCompletions,
    completion_metrics,
    kl_metrics,
    scored_entries,
)
from align.rl.first_completions import check_endings, check_equal_rewards, check_missing_eos_reward
from align.rl.maths.kl import kl_terms
from align.rl.maths.losses import explained_variance
from align.rl.prompts import Prompt
from align.rl.rollout_log import append_rollouts, rollout_entries
from align.rl.token_stats import token_mask
from finetune.recipe.errors import Problem
from finetune.training.context import RunContext
from finetune.training.generation_eval import Graders, mean_grade
from finetune.training.metrics import GOLD_PREFIX
from finetune.training.preflight.checks import CheckResult, failed

TokenTotals = tuple[int, dict[str, float]]
"""Number of tokens, and the sum of each metric over them."""
RATIO_CHECK = "ratio"
RATIO_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
"""Tolerance of the first ratios by precision: kernels with and without gradients may round differently."""


def record_rollout(
    ctx: RunContext[Settings], step: int, completions: ScoredCompletions, rewards_C: torch.Tensor
) -> None:
    """Write a rollout to rollouts.jsonl; report on the first one: endings, equal rewards, missing EOS.

    Args:
        ctx: context of the run.
        step: the first optimizer step that is trained on it.
        completions: the rollout.
        rewards_C: its shaped rewards.
    """
    ended_C = completions.ended_with_eos
    append_rollouts(
        ctx.run,
        rollout_entries(step, completions.prompts, completions.texts, completions.scores, ended_C.tolist()),
    )
    if step == 1:
        _check_first_rollout(ctx, completions, rewards_C)


def _check_first_rollout(
    ctx: RunContext[Settings], completions: ScoredCompletions, rewards_C: torch.Tensor
) -> None:
    """Report whether the first completions end, and whether never ending is worth less than any ending."""
    settings, ended_C = ctx.settings, completions.ended_with_eos
    total = [float(reward) for reward in completions.scores.total]
    ctx.check(
        *check_endings(ended_C.tolist(), settings.sampling.max_new_tokens),
        *check_equal_rewards(total, list(completions.scores.by_source)),
        *check_missing_eos_reward(rewards_C, ended_C, settings.ppo.missing_eos_reward),
    )


def value_metrics(
    values_CT: torch.Tensor, returns_CT: torch.Tensor, lengths_C: torch.Tensor
) -> dict[str, float]:
    """Return the explained variance: 1 perfect, 0 as good as a constant; empty if all returns are equal."""
    mask_CT = token_mask(lengths_C, values_CT.shape[1])
    # Equal returns give NaN or -inf, which JSON cannot hold.
    variance_explained = float(explained_variance(values_CT, returns_CT, mask_CT))
    return {"value/explained_variance": variance_explained} if isfinite(variance_explained) else {}


def approx_kl(old_logps_CT: torch.Tensor, logps_CT: torch.Tensor, mask_CT: torch.Tensor) -> torch.Tensor:
    """Return approx_kl = KL(old policy || new policy) per token by k3, (C, T), without gradient.

    The tokens were sampled from the old policy, so r - 1 - log r with r = new / old is never negative, and a
    token that has become impossible counts with its logarithm: -log(e^-20) - 1 = 19, and 2 - 1 - log 2.

    >>> then, now = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-21.0, -0.3068528]])
    >>> approx_kl(then, now, torch.tensor([[True, True]]))
    tensor([[19.0000,  0.3069]])
    """
    return kl_terms(old_logps_CT, logps_CT.detach(), estimator="k3").masked_fill(~mask_CT, 0.0)


class TokenMetricAverager:
    """Running sums of per-token metrics over micro-batches, until ``take`` resets them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.num_tokens = 0

    def add(self, metrics: dict[str, torch.Tensor], mask_CT: torch.Tensor) -> None:
        """Add (C, T) tensors; masked-out entries do not count."""
        for name, values_CT in metrics.items():
            # Filled and not multiplied by the mask: masked-out entries may be NaN. In double: sums get long.
            total = float(values_CT.detach().masked_fill(~mask_CT, 0).double().sum())
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.num_tokens += int(mask_CT.sum())

    def take(self) -> TokenTotals:
        """Return the number of tokens and the sums, and reset both."""
        totals = self.num_tokens, self.sums
        self.sums, self.num_tokens = {}, 0
        return totals


def mean_over_tokens(totals: Sequence[TokenTotals]) -> dict[str, float]:
    """Return the means over the tokens of all processes, which have the same metrics.

    >>> mean_over_tokens([(3, {"ratio": 3.0}), (1, {"ratio": 2.0})])
    {'ratio': 1.25}
    """
    # Divided once, over all processes: a mean of means would weight short micro-batches too much.
    num_tokens = max(1, sum(count for count, _ in totals))
    return {name: sum(sums[name] for _, sums in totals) / num_tokens for name in totals[0][1]}


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Evaluates the policy on held-out prompts.

    Attributes:
        prompts: the held-out prompts.
        graders: user functions; the means of their grades are the gold rewards, which the run does not
            maximize.
        rollouts: samples and scores completions.
        seed: of the run.
    """

    prompts: Sequence[Prompt]
    graders: Graders
    rollouts: Rollouts
    seed: int

    def evaluate(self, keep: KeepGraded | None = None) -> dict[str, float]:
        """Return the metrics of one completion per prompt, always sampled with the same seed.

        Args:
            keep: receives the entries of held_out.jsonl.

        Raises:
            UserError: a reward function or a grader raised or did not return a number.
        """
        rollouts = self.rollouts
        rollout_seconds = dict(rollouts.seconds)
        completions = rollouts.generate_and_score(
            self.prompts, seed=sampling_seed(self.seed, EVAL_ROLLOUT_INDEX)
        )
        stats = rollouts.score_tokens(completions, rollouts.micro_batches(completions))
        rollouts.seconds = rollout_seconds  # evaluation is not part of a rollout's time
        rows = [
            self.graders.row(prompt.messages, text, prompt.location, prompt.expected)
            for prompt, text in zip(completions.prompts, completions.texts, strict=True)
        ]
        grades = self.graders.grade(rows)
        if keep is not None:
            keep(scored_entries(completions, grades))
        gold_rewards = {f"{GOLD_PREFIX}{name}": mean_grade(name, values) for name, values in grades.items()}
        return completion_metrics(completions) | kl_metrics(completions, stats) | gold_rewards


def check_initial_ratio(ctx: RunContext[Settings], precision: str, error: float) -> None:
    """Check that the ratios of the first update to the sampling policy are 1, once per run.

    Args:
        ctx: context of the run.
        precision: of forward passes.
        error: largest difference from 1.

    Raises:
        UserError: rounding does not explain it.
    """
    if any(result["name"] == RATIO_CHECK for result in ctx.check_results):
        return
    tolerance = RATIO_TOLERANCE[precision]
    if error > tolerance:
        actual = f"ratios of the first update differ from 1 by up to {error:.2g}"
        problem = Problem("model", actual, f"at most {tolerance:g}: the policy has not changed yet")
        ctx.check(failed(RATIO_CHECK, problem))
    summary = "exactly 1" if error == 0 else f"1 within {error:.1g}"
    ctx.check(CheckResult(RATIO_CHECK, f"ratio to the sampling policy is {summary} on the first update"))
