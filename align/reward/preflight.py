"""Pre-flight checks of a reward model on the run's rows: data, margins, batch invariance, score position."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences, TokenizedGroup
from align.reward.batch import RewardBatch, RewardCollator
from align.reward.model import completion_scores
from align.reward.trainer import RewardObjective
from finetune.data.tokens import Encoder
from finetune.distributed.sharding import gathered_params
from finetune.recipe.errors import Problem
from finetune.training.model import DTYPES, Policy, preserve_state, unwrap_model
from finetune.training.preflight import data_checks, invariance_checks
from finetune.training.preflight.checks import CheckResult, failed
from finetune.training.preflight.invariance_checks import SCALE, TOLERANCE
from finetune.training.preflight.isolation import Forward, isolation_leak, largest_difference

CHECKED_COMPARISONS = 64
"""The first training comparisons, from which two short ones are checked."""


def check_data(
    data: PreparedPreferences, encoder: Encoder, embedding: nn.Module, *, max_length: int
) -> list[CheckResult]:
    """Return the checks of the tokenized training comparisons."""
    groups, report = data.train, data.report
    with gathered_params(embedding.get_parameter("weight")) as (weight,):
        vocab_size = data_checks.check_vocab_size(
            data_checks.used_tokens(groups.input_ids, encoder.stop_ids),
            weight,
            trained=any(param.requires_grad for param in embedding.parameters()),
            added=encoder.tokenizer.get_added_vocab(),
            num_tokens=len(encoder.tokenizer),
        )
    truncation = data_checks.report_truncation(
        num_rows=report.rows,
        num_too_long=report.num_too_long,
        trained_tokens=report.trained_tokens,
        lost_tokens=report.lost_tokens,
        max_length=max_length,
    )
    return [_report_score_position(groups, encoder), truncation, vocab_size]


def check_margins(groups: PreferenceGroups, *, scale: float) -> CheckResult:
    """Check that some comparison has a margin, if the loss scales margins; report how many have one."""
    has_score = np.isfinite(groups.scores)
    # reduceat takes the start of each group. No group is empty, where it would read the next one.
    all_scored = np.logical_and.reduceat(
        has_score, np.cumsum(groups.num_completions) - groups.num_completions
    )
    has_margin = np.where(groups.num_completions == 2, np.isfinite(groups.margins), all_scored)
    if not has_margin.any():
        expected = "a column `margin` (0 or more), or scores for both completions"
        problem = Problem("reward.margin_scale", "no comparison has a margin", expected, "remove it")
        return failed("margins", problem)
    scaled_margins = scale * groups.margins[has_margin]
    mean = f"mean {scaled_margins.mean():.2f}"
    detail = f"{int(has_margin.sum())} of {len(groups)} comparisons have a margin, {mean}"
    remainder = "; the others have margin 0" if not has_margin.all() else ""
    return CheckResult("margins", detail + remainder, warned=not has_margin.all())


def check_reward_model(
    policy: Policy, groups: PreferenceGroups, objective: RewardObjective, collator: RewardCollator
) -> list[CheckResult]:
    """Return the numeric checks of the model, which is not changed.

    Args:
        policy: base with adapter and head, on its device.
        groups: the training comparisons.
        objective: the training objective.
        collator: the run's collator.
    """
    model, precision = policy.model, policy.precision
    device = next(model.parameters()).device
    probe_groups = shortest_and_median_groups(groups)
    autocast = torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "float32")

    def loss_sum(batch: Mapping[str, Tensor]) -> Tensor:
        with autocast:
            return objective.losses(model, batch)[0].sum()

    # int8 quantizes activations as well, which rounds more than any dtype of the forward pass.
    tolerance = TOLERANCE["int8" if policy.quantization == "int8" else precision]
    results = invariance_checks.check_micro_batch_invariance(
        model,
        loss_sum,
        collator(probe_groups),
        [collator([group]) for group in probe_groups],
        items=len(probe_groups),
        tolerance=tolerance,
        scale=SCALE.get(precision, 1.0),
    )
    if results[0].problem:
        return results
    with autocast:
        return [*results, *_check_layouts(model, probe_groups, collator, tolerance=tolerance)]


def shortest_and_median_groups(groups: PreferenceGroups) -> list[TokenizedGroup]:
    """Return the shortest and the median-length comparison of the first ones; possibly a single one."""
    # Two lengths, so that the batch of the check has padding.
    order = np.argsort(groups.lengths[:CHECKED_COMPARISONS], kind="stable")
    return [groups[int(index)] for index in dict.fromkeys([order[0], order[len(order) // 2]])]


def _report_score_position(groups: PreferenceGroups, encoder: Encoder) -> CheckResult:
    """Report the token at which scores are read."""
    segment_lengths = np.diff(groups.offsets)
    # Segments are prompts and completions in one flat array: leave out the prompts.
    completion_segments = np.delete(np.arange(len(segment_lengths)), groups.prompt_index[:-1])
    last_ids = groups.input_ids[groups.offsets[completion_segments + 1] - 1]
    eos_fraction = float(np.isin(last_ids, encoder.stop_ids).mean())
    stop_tokens = " or ".join(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids))
    endings = f"{eos_fraction:.1%} end with {stop_tokens}, the others are truncated"
    detail = f"read at each completion's last token: {endings}"
    return CheckResult("score", detail)


def _check_layouts(
    model: nn.Module, groups: Sequence[TokenizedGroup], collator: RewardCollator, *, tolerance: float
) -> Iterator[CheckResult]:
    """Yield checks that scores agree with one-per-row scoring and with transformers' own forward pass."""
    with preserve_state(model), torch.no_grad():
        separate_scores = _collated_scores(model, RewardCollator(collator.pad_id, one_per_row=True)(groups))
        shared_scores = _collated_scores(
            model, RewardCollator(collator.pad_id, one_per_row=collator.one_per_row)(groups)
        )
        library_scores = torch.cat(
            [_transformers_scores(model, group, ids) for group in groups for ids in group.completion_ids]
        )
    # A head of zeros scores 0 everywhere: no division by 0.
    max_score = max(float(separate_scores.abs().max()), 1e-30)
    if not collator.one_per_row:
        yield from check_score_isolation(model, groups, collator)
        difference = float((shared_scores - separate_scores).abs().max()) / max_score
        detail = f"scores with a shared prompt and with one row per completion differ by {difference:.1e}"
        yield _check_agreement("layout", detail, difference, tolerance, repair="model.attention=eager")
    difference = float((library_scores - separate_scores).abs().max()) / max_score
    detail = f"scores differ from transformers' sequence classification forward by {difference:.1e}"
    yield _check_agreement("library", detail, difference, tolerance, repair="")


def check_score_isolation(
    model: nn.Module, groups: Sequence[TokenizedGroup], collator: RewardCollator
) -> Iterator[CheckResult]:
    """Yield a failed check if a score changes with the other completions of its row."""

    def forward_with(collate: RewardCollator) -> Forward:
        def forward(completions: Sequence[Tensor]) -> Sequence[Tensor]:
            remaining = iter(completions)
            changed = [
                replace(group, completion_ids=tuple(next(remaining).numpy() for _ in group.completion_ids))
                for group in groups
            ]
            return list(_collated_scores(model, collate(changed)))

        return forward

    shared, separate = (
        forward_with(RewardCollator(collator.pad_id, one_per_row=one_per_row))
        for one_per_row in (False, True)
    )
    completions = [torch.tensor(ids) for group in groups for ids in group.completion_ids]
    vocab_size = unwrap_model(model).config.get_text_config().vocab_size
    with preserve_state(model), torch.no_grad():
        leak, allowed = isolation_leak(
            shared, separate, completions, vocab_size=vocab_size, distance=largest_difference
        )
    if leak > allowed:
        actual = f"other completions of the prompt change a score by {leak:.1e}"
        problem = Problem(
            "model.base", actual, "scores of completions by themselves", "model.attention=eager"
        )
        yield failed("layout", problem)


def _check_agreement(
    name: str, detail: str, difference: float, tolerance: float, *, repair: str
) -> CheckResult:
    if difference <= tolerance:
        return CheckResult(name, detail)
    expected = f"a difference of at most {tolerance:.0e} of the largest score"
    return failed(
        name,
        Problem("model.base", detail, expected, repair or "this is a bug in llm-align: please report it"),
    )


def _collated_scores(model: nn.Module, batch: RewardBatch) -> Tensor:
    device = next(model.parameters()).device
    return completion_scores(
        model, {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
    )


def _transformers_scores(model: nn.Module, group: TokenizedGroup, completion: np.ndarray) -> Tensor:
    """Return the scores from transformers' own forward pass on a single row: (1, heads)."""
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion])).long()
    # A single row has no padding, so that the pooled score is that of its last token.
    scores: Tensor = model(input_ids=ids[None].to(next(model.parameters()).device)).logits
    return scores
