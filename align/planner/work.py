"""Work of a full run: optimizer steps, trained tokens, forward-only tokens, sampled completions."""

from dataclasses import dataclass
from math import ceil

from align.online.settings import OnlineSettings
from align.planner.micro_batch import needs_reference
from align.planner.row_lengths import RowLengths
from align.ppo.settings import Settings as PpoSettings
from align.rejection.settings import Settings as RejectionSettings
from align.stages.dpo import Settings as DpoSettings
from align.stages.kto import Settings as KtoSettings
from finetune.recipe.settings import StageSettings
from finetune.training.auto_values import optimizer_steps


@dataclass(frozen=True, slots=True)
class TotalWork:
    """Work of a full run, without the evaluations before and after it.

    Attributes:
        steps: optimizer steps.
        trained_tokens: tokens of forward and backward passes.
        forward_tokens: tokens of forward passes alone: reference, value, reward models.
        completions: sampled from the policy.
        completion_tokens: maximum tokens of one.
    """

    steps: int
    trained_tokens: float
    forward_tokens: float = 0.0
    completions: int = 0
    completion_tokens: int = 0


def total_work(settings: StageSettings, lengths: RowLengths) -> TotalWork | None:
    """Return the work of a full run; None where neither the number of rows nor of steps is known.

    Args:
        settings: a recipe's sections.
        lengths: of its rows.
    """
    if lengths.rows is None and settings.train.max_steps is None:
        return None
    if isinstance(settings, PpoSettings):
        return _ppo_work(settings, lengths)
    if isinstance(settings, RejectionSettings):
        return _rejection_work(settings, lengths)
    if isinstance(settings, OnlineSettings):
        return _online_work(settings, lengths)
    steps = _num_steps(settings, lengths.rows)
    trained_tokens = steps * settings.train.batch_size * lengths.row_tokens
    return TotalWork(steps, trained_tokens, _reference_tokens(settings, lengths, trained_tokens))


def _num_steps(settings: StageSettings, rows: int | None) -> int:
    train = settings.train
    return optimizer_steps(
        rows or 0, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )


def _reference_tokens(settings: StageSettings, lengths: RowLengths, trained_tokens: float) -> float:
    """Return the tokens that a reference scores: each row once, or in every step."""
    if isinstance(settings, KtoSettings):
        return _tokens_once(lengths, trained_tokens)
    if isinstance(settings, DpoSettings) and needs_reference(settings):
        return trained_tokens if settings.dpo.reference == "live" else _tokens_once(lengths, trained_tokens)
    return 0.0


def _tokens_once(lengths: RowLengths, trained_tokens: float) -> float:
    # Each row is scored once, and only rows that are trained on.
    return trained_tokens if lengths.rows is None else min(trained_tokens, lengths.rows * lengths.row_tokens)


def _ppo_work(settings: PpoSettings, lengths: RowLengths) -> TotalWork:
    """Return rollouts: scored by policy, reference, value and rewards; trained on by policy and value."""
    train, ppo, completion_tokens = settings.train, settings.ppo, settings.sampling.max_new_tokens
    # Optimizer steps per rollout.
    updates = ppo.ppo_epochs * (ppo.rollout_size // train.batch_size)
    rollouts = max(1, ceil(train.epochs * (lengths.rows or 0) / ppo.rollout_size))
    if train.max_steps is not None:
        rollouts = ceil(train.max_steps / updates)
    episodes = rollouts * ppo.rollout_size
    tokens = episodes * (lengths.prompt + completion_tokens)
    reward_models = sum(source.run is not None for source in settings.rewards.sources)
    steps = train.max_steps or rollouts * updates
    # Trained: policy and value. Forward only: old policy, reference and value, and each reward model.
    return TotalWork(
        steps, 2 * ppo.ppo_epochs * tokens, (3 + reward_models) * tokens, episodes, completion_tokens
    )


def _rejection_work(settings: RejectionSettings, lengths: RowLengths) -> TotalWork:
    """Return rounds of completions, and training on the best (of earlier rounds too if accumulated)."""
    rejection, completion_tokens = settings.rejection, settings.sampling.max_new_tokens
    prompts = rejection.prompts or lengths.rows or 0
    # With accumulation each round trains on the selections of all rounds so far.
    rows_per_round = [
        prompts * (round_number if rejection.accumulate_rounds else 1)
        for round_number in range(1, rejection.rounds + 1)
    ]
    steps = sum(_num_steps(settings, rows) for rows in rows_per_round)
    completions = rejection.rounds * prompts * rejection.num_generations
    tokens = lengths.prompt + completion_tokens
    reward_models = sum(source.run is not None for source in settings.rewards.sources)
    return TotalWork(
        steps,
        steps * settings.train.batch_size * tokens,
        reward_models * completions * tokens,
        completions,
        completion_tokens,
    )


def _online_work(settings: OnlineSettings, lengths: RowLengths) -> TotalWork:
    """Return the completions of every step, scored by reference and rewards, and trained on once."""
    completion_tokens = settings.sampling.max_new_tokens
    # TRL's batch size counts completions: a prompt takes num_generations places of it.
    steps = _num_steps(settings, (lengths.rows or 0) * settings.sampling.num_generations)
    completions = steps * settings.train.batch_size
    tokens = completions * (lengths.prompt + completion_tokens)
    reward_models = sum(source.run is not None for source in settings.rewards.sources)
    return TotalWork(steps, tokens, (1 + reward_models) * tokens, completions, completion_tokens)
