"""Work of a full run: optimizer steps, trained tokens, forward-only tokens, sampled completions."""

from dataclasses import dataclass
from math import ceil

from align.online.settings import OnlineSettings
from align.planning.forward import reference_needed
from align.planning.lengths import Lengths
from align.ppo.stage_settings import Settings as PpoSettings
from align.rejection.settings import Settings as RejectionSettings
from align.stages.dpo import Settings as DpoSettings
from align.stages.kto import Settings as KtoSettings
from finetune.planning.choices import optimizer_steps
from finetune.recipe.settings import StageSettings


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a full run, without the evaluations before and after it.

    Attributes:
        steps: optimizer steps.
        trained_tokens: tokens of forward and backward passes.
        forward_tokens: tokens of forward passes alone: reference, value, reward models.
        completions: sampled from the policy.
        completion_tokens: maximum tokens of one.
    """

    steps: int
    learnt: float
    read: float = 0.0
    replies: int = 0
    reply: int = 0


def work(settings: StageSettings, lengths: Lengths) -> Work | None:
    """Return the work of a full run; None where neither the number of rows nor of steps is known.

    Args:
        settings: a recipe's sections.
        lengths: of its rows.
    """
    if lengths.rows is None and settings.train.max_steps is None:
        return None
    if isinstance(settings, PpoSettings):
        return _ppo(settings, lengths)
    if isinstance(settings, RejectionSettings):
        return _rejection(settings, lengths)
    if isinstance(settings, OnlineSettings):
        return _online(settings, lengths)
    steps = _steps(settings, lengths.rows)
    learnt = steps * settings.train.batch_size * lengths.together
    return Work(steps, learnt, _reference(settings, lengths, learnt))


def _steps(settings: StageSettings, rows: int | None) -> int:
    train = settings.train
    return optimizer_steps(
        rows or 0, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
    )


def _reference(settings: StageSettings, lengths: Lengths, learnt: float) -> float:
    """Return the tokens that a reference scores: each row once, or in every step."""
    if isinstance(settings, KtoSettings):
        return _once(lengths, learnt)
    if isinstance(settings, DpoSettings) and reference_needed(settings):
        return learnt if settings.align.reference == "live" else _once(lengths, learnt)
    return 0.0


def _once(lengths: Lengths, learnt: float) -> float:
    return learnt if lengths.rows is None else min(learnt, lengths.rows * lengths.together)


def _ppo(settings: PpoSettings, lengths: Lengths) -> Work:
    """Return rollouts: scored by policy, reference, value and rewards; trained on by policy and value."""
    train, ppo, reply = settings.train, settings.ppo, settings.sampling.max_new_tokens
    # Optimizer steps per rollout.
    updates = ppo.epochs * (ppo.rollout_size // train.batch_size)
    rollouts = max(1, ceil(train.epochs * (lengths.rows or 0) / ppo.rollout_size))
    if train.max_steps is not None:
        rollouts = ceil(train.max_steps / updates)
    episodes = rollouts * ppo.rollout_size
    tokens = episodes * (lengths.prompt + reply)
    scorers = sum(source.run is not None for source in settings.reward.sources)
    steps = train.max_steps or rollouts * updates
    # Trained: policy and value. Forward only: old policy, reference and value, and each reward model.
    return Work(steps, 2 * ppo.epochs * tokens, (3 + scorers) * tokens, episodes, reply)


def _rejection(settings: RejectionSettings, lengths: Lengths) -> Work:
    """Return rounds of completions, and training on the best (of earlier rounds too if accumulated)."""
    own, reply = settings.rejection, settings.sampling.max_new_tokens
    prompts = own.prompts or lengths.rows or 0
    # With accumulation each round trains on the selections of all rounds so far.
    kept = [prompts * (number if own.memory else 1) for number in range(1, own.rounds + 1)]
    steps = sum(_steps(settings, rows) for rows in kept)
    drawn = own.rounds * prompts * own.samples
    tokens = lengths.prompt + reply
    scorers = sum(source.run is not None for source in settings.reward.sources)
    return Work(steps, steps * settings.train.batch_size * tokens, scorers * drawn * tokens, drawn, reply)


def _online(settings: OnlineSettings, lengths: Lengths) -> Work:
    """Return the completions of every step, scored by reference and rewards, and trained on once."""
    reply = settings.sampling.max_new_tokens
    steps = _steps(settings, (lengths.rows or 0) * settings.sampling.samples)
    drawn = steps * settings.train.batch_size
    tokens = drawn * (lengths.prompt + reply)
    scorers = sum(source.run is not None for source in settings.reward.sources)
    return Work(steps, tokens, (1 + scorers) * tokens, drawn, reply)
