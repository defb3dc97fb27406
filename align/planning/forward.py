"""Workload of a micro-batch by number of rows, for every stage: sequence length, predicted tokens, masks."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from align.online.settings import OnlineSettings
from align.planning.lengths import Lengths
from align.ppo.stage_settings import Settings as PpoSettings
from align.preference.losses.catalogue import find_loss
from align.rejection.settings import Settings as RejectionSettings
from align.reward.settings import Settings as RewardSettings
from align.rl.rewards.settings import RewardsSettings
from align.stages.dpo import Settings as DpoSettings
from align.stages.kto import Settings as KtoSettings
from finetune.planning.choices import GENERATED_AT_ONCE, TOKENS_PER_FORWARD
from finetune.planning.workload import Rollout, Workload
from finetune.recipe.settings import StageSettings

At = Callable[[int], Workload]
"""Number of rows of a micro-batch -> its workload."""


def forward_pass(settings: StageSettings, step: Workload, lengths: Lengths) -> At:
    """Return a function from a number of rows to the workload of a micro-batch of maximum-length rows.

    Args:
        settings: a recipe's sections.
        workload: base, adapter and training.
        lengths: of its rows.
    """
    if isinstance(settings, (DpoSettings, RewardSettings)):
        return lambda rows: _compared(settings, step, lengths, rows)
    if isinstance(settings, KtoSettings):
        judged = replace(step, objective="comparison", live_reference=False)
        return lambda rows: _lines(judged, lengths, rows, every=True, completions=rows)
    if isinstance(settings, PpoSettings):
        return lambda rows: _ppo(settings, step, lengths, rows)
    if isinstance(settings, RejectionSettings):
        drawn = replace(step, rollout=_rollout(settings, step, lengths), scorers=_scorers(settings.reward))
        longer = _with_reply(lengths, settings.sampling.max_new_tokens)
        return lambda rows: _lines(drawn, longer, rows, every=False)
    if isinstance(settings, OnlineSettings):
        return lambda rows: _online(settings, step, lengths, rows)
    return lambda rows: _supervised(settings, step, lengths, rows)


def _supervised(settings: StageSettings, step: Workload, lengths: Lengths, rows: int) -> Workload:
    # TRL computes logits at all positions.
    every = settings.data.loss_on == "all" or settings.train.engine == "trl"
    if not settings.data.packing:
        return _lines(step, lengths, rows, every=every)
    # FlashAttention 2 separates packed rows by cumulative lengths, other implementations by a block mask.
    flash = step.attention == "flash_attention_2"
    one = _lines(step, lengths, rows, every=every)
    return replace(one, lines=1, columns=rows * one.columns, masked=rows > 1 and not flash)


def _lines(step: Workload, lengths: Lengths, rows: int, *, every: bool, completions: int = 0) -> Workload:
    """Return padded rows; ``predict_all``: the head is computed for all of their tokens."""
    predicted = lengths.longest if every else min(lengths.longest, lengths.longest_reply)
    return replace(
        step,
        lines=rows,
        columns=lengths.longest,
        predicted=rows * predicted,
        completions=completions,
        masked=rows > 1,
    )


def _compared(
    settings: DpoSettings | RewardSettings, step: Workload, lengths: Lengths, rows: int
) -> Workload:
    """Return prompts with all their completions in one row; on TRL every completion has its own."""
    each = max(1, ceil(lengths.replies))
    if isinstance(settings, RewardSettings):
        own = replace(step, objective="scores", heads=len(settings.reward.heads))
    else:
        own = replace(step, objective="comparison", live_reference=_live(settings))
    if settings.train.engine == "trl":
        return _lines(own, lengths, rows * each, every=True, completions=rows * each)
    reply = min(lengths.longest, lengths.longest_reply)
    return replace(
        own,
        lines=rows,
        # One prompt, followed by all completions.
        columns=lengths.longest + (each - 1) * reply,
        predicted=rows * each * reply,
        completions=rows * each,
        masked=True,
    )


def _live(settings: DpoSettings) -> bool:
    return reference_needed(settings) and settings.align.reference == "live"


def reference_needed(settings: DpoSettings) -> bool:
    """Return whether the loss needs a reference model."""
    return find_loss(settings.align.loss_name, where="align.loss").needs.reference


def _scorers(reward: RewardsSettings) -> int:
    return sum(source.run is not None for source in reward.sources)


def _with_reply(lengths: Lengths, reply: int) -> Lengths:
    """Return the prompts' lengths with completions of the maximum length."""
    return replace(
        lengths,
        longest=lengths.longest_prompt + reply,
        longest_reply=reply,
        reply=float(reply),
        replies=1.0,
    )


def _rollout(
    settings: PpoSettings | RejectionSettings | OnlineSettings, step: Workload, lengths: Lengths
) -> Rollout:
    """Return the generation batch of a process; TRL's trainers sample all completions of a step at once."""
    reply, width = settings.sampling.max_new_tokens, lengths.longest_prompt + settings.sampling.max_new_tokens
    asked = settings.sampling.at_once
    lines = GENERATED_AT_ONCE * TOKENS_PER_FORWARD[step.device] // width if asked == "auto" else asked
    if isinstance(settings, PpoSettings):
        lines = min(lines, settings.ppo.rollout_size)
    if isinstance(settings, OnlineSettings):
        # TRL has no generation batch of its own.
        lines = settings.train.batch_size
    return Rollout(ceil(max(1, lines) / step.processes), lengths.longest_prompt, reply)


def _ppo(settings: PpoSettings, step: Workload, lengths: Lengths, rows: int) -> Workload:
    longer = _with_reply(lengths, settings.sampling.max_new_tokens)
    own = replace(
        step,
        objective="ppo",
        heads=1,
        scorers=_scorers(settings.reward),
        rollout=_rollout(settings, step, lengths),
    )
    return _lines(own, longer, rows, every=False, completions=rows)


def _online(settings: OnlineSettings, step: Workload, lengths: Lengths, rows: int) -> Workload:
    longer = _with_reply(lengths, settings.sampling.max_new_tokens)
    # Without a KL penalty TRL runs no reference.
    beta = float(str(settings.model_dump().get("align", {}).get("beta", 0)))
    own = replace(
        step,
        objective="comparison",
        live_reference=beta > 0,
        scorers=_scorers(settings.reward),
        rollout=_rollout(settings, step, lengths),
    )
    return _lines(own, longer, rows, every=False, completions=rows)
