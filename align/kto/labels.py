"""KTO's labels, good and bad: both must be there, their balance, and the metrics of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.recipe.errors import Problem, UserError
from finetune.training.metric_specs import MetricSpec
from finetune.training.preflight.checks import CheckResult

if TYPE_CHECKING:
    from align.kto.settings import KTOSettings
    from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences

KTO_METRICS = MetricSpec(
    curves={
        "loss": "training loss (mean per completion)",
        "rewards/chosen": "implicit reward of good completions",
        "rewards/rejected": "implicit reward of bad completions",
        "rewards/margins": "implicit reward margin, good over bad",
        "kto/z": "reference point z (KL to the reference, nats per completion)",
        "eval/loss": "held-out loss",
        "eval/rewards/chosen": "held-out implicit reward of good completions",
        "eval/rewards/rejected": "held-out implicit reward of bad completions",
        "eval/rewards/margins": "held-out implicit reward margin",
        "eval/kto/z": "held-out reference point z",
    },
    summary={
        "loss": ("training loss", ".4f"),
        "eval/loss": ("held-out loss", ".4f"),
        "eval/rewards/chosen": ("held-out reward of good completions", ".3f"),
        "eval/rewards/rejected": ("held-out reward of bad completions", ".3f"),
        "eval/rewards/margins": ("held-out margin", ".3f"),
    },
    first_last=("loss", "rewards/margins", "kto/z"),
)
RECOMMENDED_WEIGHT_RATIO = (1.0, 4 / 3)
"""Recommended ratio of total desirable to undesirable weight: arXiv 2402.01306, equation 9."""


def require_both_labels(data: PreparedPreferences) -> None:
    """Raise if all rows are good or all bad, or if all training rows have one prompt.

    Raises:
        UserError: for the training rows or the held-out ones.
    """
    problems = []
    repairs = {
        "data.source": "train on good completions with `llm-align sft`",
        "data.held_out": "hold out more rows, or 0",
    }
    for key, rows in (("data.source", data.train), ("data.held_out", data.held_out)):
        num_good = 0 if rows is None else int((rows.scores == 1).sum())
        if rows is not None and num_good in (0, len(rows)):
            actual = f"{len(rows)} completions, all {'good' if num_good else 'bad'}"
            problems.append(Problem(key, actual, "good and bad completions", repairs[key]))
    if len({row.prompt_ids.tobytes() for row in data.train}) == 1:
        actual = f"{len(data.train)} completions of one prompt"
        expected = "at least two prompts: KTO's KL estimate pairs prompts with completions of other prompts"
        problems.append(Problem("data.source", actual, expected, "add rows with other prompts"))
    if problems:
        raise UserError(problems)


def check_label_balance(rows: PreferenceGroups, kto: KTOSettings) -> CheckResult:
    """Check the ratio of desirable to undesirable weight, and suggest the paper's if it is out of range."""
    num_good = int((rows.scores == 1).sum())
    num_bad = len(rows) - num_good
    # lambda_D n_D / (lambda_U n_U)
    ratio = kto.desirable_weight * num_good / (kto.undesirable_weight * num_bad)
    low, high = RECOMMENDED_WEIGHT_RATIO
    detail = f"{num_good} good completions, {num_bad} bad; weighted {ratio:.2f} to 1"
    # 1e-9: 4/3 and products of weights are not exact in floating point.
    if low - 1e-9 <= ratio <= high + 1e-9:
        return CheckResult("balance", detail)
    if ratio < low:
        advice = f"kto.desirable_weight={kto.desirable_weight * low / ratio:.3g}"
    else:
        advice = f"kto.undesirable_weight={kto.undesirable_weight * ratio / high:.3g}"
    return CheckResult("balance", f"{detail} (recommended: 1 to 1.33): {advice}", warned=True)
