"""What a plan needs to know of each stage: its rows in a micro-batch, and the work of its full run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

from align.online.settings import OnlineSettings
from align.planner.row_lengths import RowLengths
from align.ppo.settings import Settings as PpoSettings
from align.preference.losses.catalog import find_loss
from align.rejection.settings import Settings as RejectionSettings
from align.reward.settings import Settings as RewardSettings
from align.stages.dpo import Settings as DpoSettings
from finetune.planner.estimate import GenerationBatch, TotalWork, Workload
from finetune.recipe.settings import StageSettings
from finetune.training import auto_values

WorkloadOfRows = Callable[[int], Workload]
"""Number of rows of a micro-batch -> its workload."""


@dataclass(frozen=True)
class StagePlan:
    """A stage that trains on conversations: sft and chain_of_hindsight; the others override what differs.

    Attributes:
        settings: a recipe's sections.
        COMPLETIONS: per row, where rows cannot be read.
        LABELED: whether each completion is a row of its own, with a label (KTO).
        BLOCKS: whether documents are concatenated and split into rows of ``data.max_length``.
        GENERATES: whether the data are prompts, and the stage samples their completions.
        BATCHES_GENERATION: whether it samples in batches of ``sampling.generation_batch_size``.
        MIN_ROWS: minimum rows of a micro-batch.
    """

    settings: StageSettings
    COMPLETIONS: ClassVar[int] = 1
    LABELED: ClassVar[bool] = False
    BLOCKS: ClassVar[bool] = False
    GENERATES: ClassVar[bool] = False
    BATCHES_GENERATION: ClassVar[bool] = False
    MIN_ROWS: ClassVar[int] = 1

    @property
    def length_key(self) -> str:
        """Return the setting that limits a row's tokens: of a prompt, in stages that generate."""
        return "data.max_prompt_length" if self.GENERATES else "data.max_length"

    def max_length(self, context: int) -> tuple[int, str]:
        """Return the value of ``length_key``, and the reason; ``context``: the model's positions.

        Raises:
            UserError: the requested length does not fit the model.
        """
        return auto_values.max_length(
            self.settings.data.max_length, context=context, virtual_tokens=self.settings.adapter.positions
        )

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        """Return the workload of a micro-batch of N rows of maximum length.

        Args:
            workload: base, adapter and training.
            lengths: of the recipe's rows.
            rows: their number.
        """
        # TRL computes logits at all positions.
        predict_all = self.settings.data.loss_on == "all" or self.settings.train.engine == "trl"
        padded = _padded_rows(workload, lengths, rows, predict_all=predict_all)
        if not self.settings.data.packing:
            return padded
        # FlashAttention 2 separates packed rows by cumulative lengths, other implementations by a block mask.
        flash = workload.attention == "flash_attention_2"
        return replace(padded, rows=1, seq_len=rows * padded.seq_len, masked=rows > 1 and not flash)

    def total_work(self, lengths: RowLengths) -> TotalWork | None:
        """Return the work of a full run; None where neither the number of rows nor of steps is known."""
        known = lengths.rows is not None or self.settings.train.max_steps is not None
        return self._work(lengths) if known else None

    def _work(self, lengths: RowLengths) -> TotalWork:
        train, steps = self.settings.train, self._num_steps(lengths.rows)
        # The last batch of an epoch may have fewer rows.
        complete = train.max_steps is not None or lengths.rows is None
        num_rows = steps * train.batch_size if complete else (lengths.rows or 0) * train.epochs
        trained_tokens = num_rows * lengths.row_tokens
        return TotalWork(steps, trained_tokens, self._reference_tokens(lengths, trained_tokens))

    def _num_steps(self, rows: int | None) -> int:
        train = self.settings.train
        return auto_values.optimizer_steps(
            rows or 0, batch_size=train.batch_size, epochs=train.epochs, max_steps=train.max_steps
        )

    def trained_share(self, lengths: RowLengths) -> float | None:
        """Return the fraction of the tokens that carry loss; None where completions are sampled."""
        if self.settings.data.loss_on == "all":
            return 1.0
        return lengths.completions * lengths.completion / max(1.0, lengths.row_tokens)

    def _reference_tokens(self, lengths: RowLengths, trained_tokens: float) -> float:
        """Return the tokens that a reference model scores."""
        return 0.0


class PretrainPlan(StagePlan):
    """Continued pretraining: full rows, a loss on every token."""

    BLOCKS = True


class GroupPlan(StagePlan):
    """Preference data: a prompt with all its completions is one row; on TRL every completion has its own."""

    settings: DpoSettings | RewardSettings
    COMPLETIONS = 2

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        # Rounded up: only the mean is known, and memory is planned for complete groups.
        completions_per_row = max(1, ceil(lengths.completions))
        completions = rows * completions_per_row
        if self.settings.train.engine == "trl":
            return _padded_rows(workload, lengths, completions, predict_all=True, completions=completions)
        completion_tokens = min(lengths.longest, lengths.longest_completion)
        return replace(
            workload,
            rows=rows,
            # One prompt, followed by all completions.
            seq_len=lengths.longest + (completions_per_row - 1) * completion_tokens,
            predicted=completions * completion_tokens,
            completions=completions,
            masked=True,
        )


class DpoPlan(GroupPlan):
    """The preference losses; those with a reference score each row once, or in every step."""

    settings: DpoSettings

    @property
    def _needs_reference(self) -> bool:
        return find_loss(self.settings.dpo.loss_name, where="dpo.loss").needs.reference

    @property
    def _runs_reference(self) -> bool:
        return self._needs_reference and self.settings.dpo.reference == "live"

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        comparison = replace(workload, objective="comparison", live_reference=self._runs_reference)
        return super().micro_batch(comparison, lengths, rows)

    def _reference_tokens(self, lengths: RowLengths, trained_tokens: float) -> float:
        if not self._needs_reference:
            return 0.0
        return trained_tokens if self._runs_reference else _tokens_once(lengths, trained_tokens)


class RewardPlan(GroupPlan):
    """Reward models: scores of completions by one or two heads."""

    settings: RewardSettings

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        scores = replace(workload, objective="scores", heads=len(self.settings.reward.heads))
        return super().micro_batch(scores, lengths, rows)


class KtoPlan(StagePlan):
    """KTO: a completion is compared with the others of its micro-batch; the reference scores each once."""

    LABELED = True
    MIN_ROWS = 2

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        comparison = replace(workload, objective="comparison", live_reference=False)
        return _padded_rows(comparison, lengths, rows, predict_all=True, completions=rows)

    def _reference_tokens(self, lengths: RowLengths, trained_tokens: float) -> float:
        return _tokens_once(lengths, trained_tokens)


class SamplingPlan(StagePlan):
    """Stages that sample completions of prompts and score them."""

    settings: PpoSettings | RejectionSettings | OnlineSettings
    COMPLETIONS = 0
    GENERATES = BATCHES_GENERATION = True

    def trained_share(self, lengths: RowLengths) -> None:
        """Return None: which tokens are trained depends on what is sampled."""

    def max_length(self, context: int) -> tuple[int, str]:
        data, completion_tokens = self.settings.data, self.settings.sampling.max_new_tokens
        if data.max_prompt_length is not None:
            return data.max_prompt_length, "as requested"
        limit = min(context - self.settings.adapter.positions, auto_values.DEFAULT_MAX_LENGTH)
        reason = f"maximum length minus a completion of {completion_tokens} tokens"
        return max(1, limit - completion_tokens), reason

    @property
    def _reward_models(self) -> int:
        return sum(source.run is not None for source in self.settings.rewards.sources)

    def _generation_rows(self, workload: Workload, positions: int) -> int:
        """Return the completions sampled at once by all processes."""
        requested = self.settings.sampling.generation_batch_size
        saturating = auto_values.GENERATION_TOKENS[workload.device]
        return saturating // positions if requested == "auto" else requested

    def _sampled(self, workload: Workload, lengths: RowLengths, rows: int, **loss: Any) -> Workload:
        """Return a micro-batch of prompts with completions of the maximum length; ``loss``: its fields."""
        prompt, completion = lengths.longest_prompt, self.settings.sampling.max_new_tokens
        batch_rows = self._generation_rows(workload, prompt + completion)
        generation = GenerationBatch(ceil(max(1, batch_rows) / workload.processes), prompt, completion)
        completed = replace(
            lengths,
            longest=prompt + completion,
            longest_completion=completion,
            completion=float(completion),
            completions=1.0,
        )
        sampling = replace(workload, rollout=generation, scorers=self._reward_models, **loss)
        completions = rows if loss else 0
        return _padded_rows(sampling, completed, rows, predict_all=False, completions=completions)


class PpoPlan(SamplingPlan):
    """PPO: rollouts, scored by policy, reference, value and rewards; trained on by policy and value."""

    settings: PpoSettings

    def _generation_rows(self, workload: Workload, positions: int) -> int:
        return min(super()._generation_rows(workload, positions), self.settings.ppo.rollout_size)

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        return self._sampled(workload, lengths, rows, objective="ppo", heads=1)

    def _work(self, lengths: RowLengths) -> TotalWork:
        train, ppo, completion_tokens = (
            self.settings.train,
            self.settings.ppo,
            self.settings.sampling.max_new_tokens,
        )
        # Optimizer steps per rollout.
        updates = ppo.ppo_epochs * (ppo.rollout_size // train.batch_size)
        rollouts = max(1, ceil(train.epochs * (lengths.rows or 0) / ppo.rollout_size))
        if train.max_steps is not None:
            rollouts = ceil(train.max_steps / updates)
        episodes = rollouts * ppo.rollout_size
        tokens = episodes * (lengths.prompt + completion_tokens)
        steps = train.max_steps or rollouts * updates
        # Trained: policy and value. Forward only: old policy, reference and value, and each reward model.
        trained_tokens, forward_tokens = 2 * ppo.ppo_epochs * tokens, (3 + self._reward_models) * tokens
        return TotalWork(steps, trained_tokens, forward_tokens, episodes, completion_tokens)


class RejectionPlan(SamplingPlan):
    """Rejection sampling: rounds of completions, and SFT on the best (of earlier rounds too if so set)."""

    settings: RejectionSettings

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        return self._sampled(workload, lengths, rows)

    def _work(self, lengths: RowLengths) -> TotalWork:
        rejection, completion_tokens = self.settings.rejection, self.settings.sampling.max_new_tokens
        prompts = rejection.prompts or lengths.rows or 0
        # With accumulation each round trains on the selections of all rounds so far.
        rows_per_round = [
            prompts * (round_number if rejection.accumulate_rounds else 1)
            for round_number in range(1, rejection.rounds + 1)
        ]
        steps = sum(self._num_steps(rows) for rows in rows_per_round)
        completions = rejection.rounds * prompts * rejection.num_generations
        tokens = lengths.prompt + completion_tokens
        return TotalWork(
            steps,
            steps * self.settings.train.batch_size * tokens,
            self._reward_models * completions * tokens,
            completions,
            completion_tokens,
        )


class OnlinePlan(SamplingPlan):
    """RLOO and GRPO on TRL: the completions of a step are sampled at once, scored and trained on once."""

    settings: OnlineSettings
    BATCHES_GENERATION = False

    def _generation_rows(self, workload: Workload, positions: int) -> int:
        return self.settings.train.batch_size

    def micro_batch(self, workload: Workload, lengths: RowLengths, rows: int) -> Workload:
        # Each has beta in a section of its own; without a KL penalty TRL runs no reference.
        sections = dict(self.settings)
        beta = next(sections[name].beta for name in ("rloo", "grpo") if name in sections)
        return self._sampled(workload, lengths, rows, objective="comparison", live_reference=beta > 0)

    def _work(self, lengths: RowLengths) -> TotalWork:
        settings, completion_tokens = self.settings, self.settings.sampling.max_new_tokens
        # TRL's batch size counts completions: a prompt takes num_generations places of it.
        steps = self._num_steps((lengths.rows or 0) * settings.sampling.num_generations)
        completions = steps * settings.train.batch_size
        tokens = completions * (lengths.prompt + completion_tokens)
        return TotalWork(steps, tokens, (1 + self._reward_models) * tokens, completions, completion_tokens)


STAGE_PLANS: dict[str, type[StagePlan]] = {
    "pretrain": PretrainPlan,
    "dpo": DpoPlan,
    "reward": RewardPlan,
    "kto": KtoPlan,
    "ppo": PpoPlan,
    "rejection": RejectionPlan,
    "rloo": OnlinePlan,
    "grpo": OnlinePlan,
}
"""The plans of stages that are not planned like sft."""


def stage_plan(stage: str, settings: StageSettings) -> StagePlan:
    """Return the plan of a stage by its name."""
    return STAGE_PLANS.get(stage, StagePlan)(settings)


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


def _tokens_once(lengths: RowLengths, trained_tokens: float) -> float:
    # Each row is scored once, and only rows that are trained on.
    return trained_tokens if lengths.rows is None else min(trained_tokens, lengths.rows * lengths.row_tokens)
