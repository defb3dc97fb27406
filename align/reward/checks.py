"""Pre-flight checks of a reward model on the run's rows: data, margins, batch invariance, score position."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences, TokenizedGroup
from align.reward.collate import RewardBatch, RewardCollator
from align.reward.model import completion_scores
from align.reward.objective import Objective
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem
from finetune.training.apart import whole
from finetune.training.model import DTYPES
from finetune.training.preflight import probes, rows, vocabulary
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.preflight.untouched import untouched
from finetune.training.preflight.whole import SCALE, TOLERANCE

LOOKED_AT = 64
"""The first training comparisons, from which two short ones are checked."""


def data_ticks(
    data: PreparedPreferences, encoder: Encoder, embedding: nn.Module, *, max_length: int
) -> list[Tick]:
    """Return the checks of the tokenized training comparisons."""
    groups, report = data.train, data.report
    with whole(embedding.get_parameter("weight")) as (weight,):
        embedded = vocabulary.embeddings_exist(
            vocabulary.used_tokens(groups.input_ids, encoder.stop_ids),
            weight,
            trained=any(one.requires_grad for one in embedding.parameters()),
            added=encoder.tokenizer.get_added_vocab(),
            num_tokens=len(encoder.tokenizer),
        )
    cut = rows.cut_is_told(
        rows=report.rows,
        too_long=report.too_long,
        trained=report.trained_tokens,
        lost=report.lost_tokens,
        max_length=max_length,
    )
    return [_where_read(groups, encoder), cut, embedded]


def margins_tick(groups: PreferenceGroups, *, scale: float) -> Tick:
    """Report how many comparisons have margins; fail if none has."""
    scores = np.isfinite(groups.scores)
    lists = np.logical_and.reduceat(scores, np.cumsum(groups.completions) - groups.completions)
    known = np.where(groups.completions == 2, np.isfinite(groups.margins), lists)
    if not known.any():
        expected = "a column `margin` (0 or more), or scores for both completions"
        problem = Problem("reward.margins", "no comparison has a margin", expected, "remove it")
        return failed("margins", problem)
    values = scale * groups.margins[known]
    told = f"{int(known.sum())} of {len(groups)} comparisons have a margin, mean {values.mean():.2f}"
    rest = "; the others have margin 0" if not known.all() else ""
    return Tick("margins", told + rest, warned=not known.all())


def model_ticks(
    model: nn.Module,
    groups: PreferenceGroups,
    objective: Objective,
    collate: RewardCollator,
    *,
    precision: str,
    quantization: str,
) -> list[Tick]:
    """Return the numeric checks of the model, which is not changed.

    Args:
        model: base with adapter and head, on its device.
        groups: the training comparisons.
        objective: the training objective.
        collator: the run's collator.
        precision: dtype of the forward pass.
        quantization: quantization of the base.
    """
    device = next(model.parameters()).device
    some = short_groups(groups)
    autocast = torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "float32")

    def loss_sum(batch: Mapping[str, Tensor]) -> Tensor:
        with autocast:
            return objective.losses(model, batch)[0].sum()

    tolerance = TOLERANCE["int8" if quantization == "int8" else precision]
    ticks = probes.whole_is_its_parts(
        model,
        loss_sum,
        collate(some),
        [collate([group]) for group in some],
        items=len(some),
        tolerance=tolerance,
        scale=SCALE.get(precision, 1.0),
    )
    if ticks[0].problem:
        return ticks
    with autocast:
        return [*ticks, *_layout_ticks(model, some, collate, tolerance=tolerance)]


def short_groups(groups: PreferenceGroups) -> list[TokenizedGroup]:
    """Return the shortest and the median-length comparison of the first ones; possibly a single one."""
    order = np.argsort(groups.lengths[:LOOKED_AT], kind="stable")
    return [groups[int(index)] for index in dict.fromkeys([order[0], order[len(order) // 2]])]


def _where_read(groups: PreferenceGroups, encoder: Encoder) -> Tick:
    """Report the token at which scores are read."""
    lengths = np.diff(groups.starts)
    completions = np.delete(np.arange(len(lengths)), groups.firsts[:-1])
    last = groups.input_ids[groups.starts[completions + 1] - 1]
    share = float(np.isin(last, encoder.stop_ids).mean())
    names = " or ".join(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids))
    detail = f"read at each completion's last token: {share:.1%} end with {names}, the others are truncated"
    return Tick("score", detail)


def _layout_ticks(
    model: nn.Module, groups: Sequence[TokenizedGroup], collate: RewardCollator, *, tolerance: float
) -> Iterator[Tick]:
    """Yield checks that scores agree with one-per-row scoring and with transformers' own forward pass."""
    with untouched(model), torch.no_grad():
        alone = _scores(model, RewardCollator(collate.pad_id, separate=True)(groups))
        together = _scores(model, RewardCollator(collate.pad_id, separate=collate.separate)(groups))
        plain = torch.cat([_plain(model, group, ids) for group in groups for ids in group.completion_ids])
    size = max(float(alone.abs().max()), 1e-30)
    if not collate.separate:
        apart = float((together - alone).abs().max()) / size
        told = f"scores with a shared prompt and with one row per completion differ by {apart:.1e}"
        yield _compared("layout", told, apart, tolerance, repair="model.attention=eager")
    apart = float((plain - alone).abs().max()) / size
    told = f"scores differ from transformers' sequence classification forward by {apart:.1e}"
    yield _compared("library", told, apart, tolerance, repair="")


def _compared(name: str, told: str, apart: float, tolerance: float, *, repair: str) -> Tick:
    if apart <= tolerance:
        return Tick(name, told)
    expected = f"a difference of at most {tolerance:.0e} of the largest score"
    return failed(
        name, Problem("model.base", told, expected, repair or "this is a bug in llm-align: please report it")
    )


def _scores(model: nn.Module, batch: RewardBatch) -> Tensor:
    device = next(model.parameters()).device
    return completion_scores(model, {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)})


def _plain(model: nn.Module, group: TokenizedGroup, completion: np.ndarray) -> Tensor:
    """Return the scores from transformers' own forward pass on a single row: (1, heads)."""
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion])).long()
    scores: Tensor = model(input_ids=ids[None].to(next(model.parameters()).device)).logits
    return scores
