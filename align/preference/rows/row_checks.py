"""What a method or an engine needs of preference rows: pairs, both labels, labels of balanced weight."""

from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from finetune.recipe.errors import Problem, UserError
from finetune.training.preflight.checks import CheckResult

RECOMMENDED_WEIGHT_RATIO = (1.0, 4 / 3)
"""Recommended ratio of total desirable to undesirable weight: arXiv 2402.01306, equation 9."""


def require_pairs(data: PreparedPreferences) -> None:
    """Raise if a group is not a pair, which TRL's trainers of preferences need.

    Raises:
        UserError: a group has more than two completions; the first one is named.
    """
    for key, groups in (("data.source", data.train), ("data.held_out", data.held_out)):
        if groups is None:
            continue
        not_pairs = [index for index, count in enumerate(groups.num_completions) if count != 2]
        if not_pairs:
            first = groups[not_pairs[0]]
            actual = (
                f"{len(not_pairs)} prompts with more than two completions (first: {first.location}, "
                f"{len(first.completion_ids)} completions)"
            )
            raise UserError(Problem(key, actual, "pairs, with train.engine 'trl'", "train.engine=native"))


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


def check_label_balance(
    rows: PreferenceGroups, *, desirable_weight: float, undesirable_weight: float
) -> CheckResult:
    """Check that good and bad completions have the paper's ratio of weights, or suggest a weight."""
    num_good = int((rows.scores == 1).sum())
    num_bad = len(rows) - num_good
    # lambda_D n_D / (lambda_U n_U)
    ratio = desirable_weight * num_good / (undesirable_weight * num_bad)
    low, high = RECOMMENDED_WEIGHT_RATIO
    detail = f"{num_good} good completions, {num_bad} bad; weighted {ratio:.2f} to 1"
    # 1e-9: 4/3 and products of weights are not exact in floating point.
    if low - 1e-9 <= ratio <= high + 1e-9:
        return CheckResult("balance", detail)
    if ratio < low:
        advice = f"kto.desirable_weight={desirable_weight * low / ratio:.3g}"
    else:
        advice = f"kto.undesirable_weight={undesirable_weight * ratio / high:.3g}"
    return CheckResult("balance", f"{detail} (recommended: 1 to 1.33): {advice}", warned=True)
