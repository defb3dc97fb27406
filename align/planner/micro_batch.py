"""Workload of a micro-batch by number of rows, for every stage: sequence length, predicted tokens, masks."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from align.online.settings import OnlineSettings
from align.planner.row_lengths import RowLengths
from align.ppo.settings import Settings as PpoSettings
from align.preference.losses.catalog import find_loss
from align.rejection.settings import Settings as RejectionSettings
from align.reward.settings import Settings as RewardSettings
from align.rl.rewards.settings import RewardsSettings
from align.stages.dpo import Settings as DpoSettings
from align.stages.kto import Settings as KtoSettings
from finetune.planner.workload import GenerationBatch, Workload
from finetune.recipe.settings import StageSettings
from finetune.training.auto_values import GENERATION_TOKEN_FACTOR, TOKENS_PER_FORWARD

WorkloadOfRows = Callable[[int], Workload]
"""Number of rows of a micro-batch -> its workload."""


def micro_batch_workload(settings: StageSettings, workload: Workload, lengths: RowLengths) -> WorkloadOfRows:
    """Return a function from a number of rows to the workload of a micro-batch of maximum-length rows.

    Args:
        settings: a recipe's sections.
        workload: base, adapter and training.
        lengths: of its rows.
    """
    if isinstance(settings, (DpoSettings, RewardSettings)):
        return lambda rows: _preference_workload(settings, workload, lengths, rows)
    if isinstance(settings, KtoSettings):
        comparison = replace(workload, objective="comparison", live_reference=False)
        return lambda rows: _padded_rows(comparison, lengths, rows, predict_all=True, completions=rows)
    if isinstance(settings, PpoSettings):
        return lambda rows: _ppo_workload(settings, workload, lengths, rows)
    if isinstance(settings, RejectionSettings):
        generating = replace(
            workload,
            rollout=_generation_batch(settings, workload, lengths),
            scorers=_count_reward_models(settings.rewards),
        )
        completed_lengths = _with_completion(lengths, settings.sampling.max_new_tokens)
        return lambda rows: _padded_rows(generating, completed_lengths, rows, predict_all=False)
    if isinstance(settings, OnlineSettings):
        return lambda rows: _online_workload(settings, workload, lengths, rows)
    return lambda rows: _supervised_workload(settings, workload, lengths, rows)


def _supervised_workload(
    settings: StageSettings, workload: Workload, lengths: RowLengths, rows: int
) -> Workload:
    # TRL computes logits at all positions.
    predict_all = settings.data.loss_on == "all" or settings.train.engine == "trl"
    if not settings.data.packing:
        return _padded_rows(workload, lengths, rows, predict_all=predict_all)
    # FlashAttention 2 separates packed rows by cumulative lengths, other implementations by a block mask.
    flash = workload.attention == "flash_attention_2"
    padded = _padded_rows(workload, lengths, rows, predict_all=predict_all)
    return replace(padded, rows=1, seq_len=rows * padded.seq_len, masked=rows > 1 and not flash)


def _padded_rows(
    workload: Workload, lengths: RowLengths, rows: int, *, predict_all: bool, completions: int = 0
) -> Workload:
    """Return padded rows; ``predict_all``: the head is computed for all of their tokens."""
    predicted = lengths.longest if predict_all else min(lengths.longest, lengths.longest_completion)
    return replace(
        workload,
        rows=rows,
        seq_len=lengths.longest,
        predicted=rows * predicted,
        completions=completions,
        masked=rows > 1,
    )


def _preference_workload(
    settings: DpoSettings | RewardSettings, workload: Workload, lengths: RowLengths, rows: int
) -> Workload:
    """Return prompts with all their completions in one row; on TRL every completion has its own."""
    # Rounded up: only the mean is known, and memory is planned for complete groups.
    completions_per_row = max(1, ceil(lengths.completions))
    if isinstance(settings, RewardSettings):
        stage_workload = replace(workload, objective="scores", heads=len(settings.reward.heads))
    else:
        stage_workload = replace(
            workload, objective="comparison", live_reference=_needs_live_reference(settings)
        )
    if settings.train.engine == "trl":
        return _padded_rows(
            stage_workload,
            lengths,
            rows * completions_per_row,
            predict_all=True,
            completions=rows * completions_per_row,
        )
    completion_tokens = min(lengths.longest, lengths.longest_completion)
    return replace(
        stage_workload,
        rows=rows,
        # One prompt, followed by all completions.
        seq_len=lengths.longest + (completions_per_row - 1) * completion_tokens,
        predicted=rows * completions_per_row * completion_tokens,
        completions=rows * completions_per_row,
        masked=True,
    )


def _needs_live_reference(settings: DpoSettings) -> bool:
    return needs_reference(settings) and settings.dpo.reference == "live"


def needs_reference(settings: DpoSettings) -> bool:
    """Return whether the loss needs a reference model."""
    return find_loss(settings.dpo.loss_name, where="dpo.loss").needs.reference


def _count_reward_models(reward: RewardsSettings) -> int:
    return sum(source.run is not None for source in reward.sources)


def _with_completion(lengths: RowLengths, completion_tokens: int) -> RowLengths:
    """Return the prompts' lengths with completions of the maximum length."""
    return replace(
        lengths,
        longest=lengths.longest_prompt + completion_tokens,
        longest_completion=completion_tokens,
        completion=float(completion_tokens),
        completions=1.0,
    )


def _generation_batch(
    settings: PpoSettings | RejectionSettings | OnlineSettings, workload: Workload, lengths: RowLengths
) -> GenerationBatch:
    """Return the generation batch of a process; TRL's trainers sample all completions of a step at once."""
    completion_tokens, positions = (
        settings.sampling.max_new_tokens,
        lengths.longest_prompt + settings.sampling.max_new_tokens,
    )
    requested = settings.sampling.generation_batch_size
    rows = (
        GENERATION_TOKEN_FACTOR * TOKENS_PER_FORWARD[workload.device] // positions
        if requested == "auto"
        else requested
    )
    if isinstance(settings, PpoSettings):
        rows = min(rows, settings.ppo.rollout_size)
    if isinstance(settings, OnlineSettings):
        # TRL has no generation batch of its own.
        rows = settings.train.batch_size
    return GenerationBatch(ceil(max(1, rows) / workload.processes), lengths.longest_prompt, completion_tokens)


def _ppo_workload(settings: PpoSettings, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
    completed_lengths = _with_completion(lengths, settings.sampling.max_new_tokens)
    ppo_workload = replace(
        workload,
        objective="ppo",
        heads=1,
        scorers=_count_reward_models(settings.rewards),
        rollout=_generation_batch(settings, workload, lengths),
    )
    return _padded_rows(ppo_workload, completed_lengths, rows, predict_all=False, completions=rows)


def _online_workload(
    settings: OnlineSettings, workload: Workload, lengths: RowLengths, rows: int
) -> Workload:
    completed_lengths = _with_completion(lengths, settings.sampling.max_new_tokens)
    # Without a KL penalty TRL runs no reference. RLOO and GRPO each have beta in a section of their own.
    beta = float(str(settings.model_dump().get("rloo", settings.model_dump().get("grpo", {})).get("beta", 0)))
    stage_workload = replace(
        workload,
        objective="comparison",
        live_reference=beta > 0,
        scorers=_count_reward_models(settings.rewards),
        rollout=_generation_batch(settings, workload, lengths),
    )
    return _padded_rows(stage_workload, completed_lengths, rows, predict_all=False, completions=rows)
