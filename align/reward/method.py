"""Reward model training from a recipe: pre-flight checks, trainer, evaluation, saving."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from finetune.training.shared_steps import (
    engine_arguments,
    log_parameter_counts,
    num_optimizer_steps,
    policy_metadata,
    record_training_metrics,
    save_policy,
)
from transformers import Trainer, TrainingArguments

from align.engines.trl.preference import require_pairs
from align.preference.attention import block_mask_unsupported, forward_cost
from align.preference.rows.dataset import PreparedPreferences
from align.reward.collate import RewardCollator
from align.reward.evaluation import RewardEvaluator
from align.reward.loading import non_stop_pad_id
from align.reward.model import find_input_embeddings
from align.reward.objective import RewardObjective
from align.reward.preflight import check_data, check_margins, check_reward_model
from align.reward.settings import Settings, head_indices
from align.reward.trainer import RewardTrainer
from align.reward.trl_engine import build_trl_reward_trainer, reward_config_spec
from finetune.training import auto_values
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.context import RunContext
from finetune.training.model import Policy
from finetune.training.preflight.checks import CheckResult
from finetune.training.text_encoding import TextEncoding


@dataclass(frozen=True)
class RewardModeling:
    """Train a reward model on preference comparisons."""

    ctx: RunContext
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy

    @property
    def settings(self) -> Settings:
        settings = self.ctx.recipe.settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def num_steps(self) -> int:
        """Return the total number of optimizer steps."""
        return num_optimizer_steps(self.ctx, len(self.data.train))

    @property
    def objective(self) -> RewardObjective:
        """Return the training objective."""
        reward = self.settings.reward
        return RewardObjective(
            tuple(head_indices(self.settings)), reward.center_rewards_coefficient, reward.margin_scale
        )

    @cached_property
    def block_mask_unsupported(self) -> str:
        """Return why the model cannot take a block mask; empty if completions can share their prompt."""
        datasets = [rows for rows in (self.data.train, self.data.held_out) if rows is not None]
        max_positions = max(rows.longest for rows in datasets) + self.text.virtual_tokens
        return block_mask_unsupported(self.policy.model.config, max_positions=max_positions)

    @property
    def collator(self) -> RewardCollator:
        """Return the collator of the recipe's layout."""
        encoder = self.text.encoder
        pad_token_id, cost = (
            non_stop_pad_id(encoder.tokenizer, encoder.stop_ids),
            forward_cost(self.policy.model),
        )
        return RewardCollator(pad_token_id, one_per_row=bool(self.block_mask_unsupported), cost=cost)

    def metadata(self) -> dict[str, Any]:
        """Validate the run, and return the run.json fields known before step 0."""
        # For its checks: invalid arguments are reported before training.
        self.arguments()
        log_parameter_counts(self.ctx, self.policy)
        self.preflight()
        metadata = policy_metadata(self.ctx, self.text, self.policy, self.data.report)
        # What `load_reward_model` needs to score as in training is added to the metadata of every policy.
        settings, max_length = self.settings, self.text.max_length
        metadata["reload"] |= {
            "heads": settings.reward.heads,
            "pad_id": self.collator.pad_id,
            "max_length": max_length,
            "max_prompt_length": settings.data.max_prompt_length or max_length // 2,
            "rules": [rule.model_dump() for rule in settings.reward.rules],
        }
        return metadata

    def preflight(self) -> None:
        """Run the pre-flight checks on the run's rows and model; neither is changed.

        Raises:
            UserError: a check failed.
        """
        ctx, policy = self.ctx, self.policy
        # TRL's RewardTrainer takes pairs only; the native one takes ranked lists too.
        if self.uses_trl:
            require_pairs(self.data.train, where="data.source")
            if self.data.held_out is not None:
                require_pairs(self.data.held_out, where="data.held_out")
        with ctx.timed("preflight"):
            ctx.check(CheckResult("environment", ctx.describe_environment(policy.precision)))
            if self.block_mask_unsupported:
                ctx.check(CheckResult("layout", f"prompt sharing off: {self.block_mask_unsupported}"))
            train, model = self.data.train, policy.model
            max_length = self.text.max_length
            ctx.check(
                *check_data(self.data, self.text.encoder, find_input_embeddings(model), max_length=max_length)
            )
            if self.settings.reward.margin_scale is not None:
                ctx.check(check_margins(train, scale=self.settings.reward.margin_scale))
            weight_format = {"precision": policy.precision, "quantization": policy.quantization}
            ctx.check(*check_reward_model(model, train, self.objective, self.collator, **weight_format))

    def arguments(self) -> TrainingArguments:
        """Return the engine's arguments, with ``auto`` values resolved.

        Raises:
            UserError: the engine rejects them.
        """
        longest = int(self.data.train.lengths.max())
        config_spec = reward_config_spec(
            center_rewards_coefficient=self.settings.reward.center_rewards_coefficient
        )
        return engine_arguments(
            self.ctx, self.policy, longest=longest, steps=self.num_steps, stage=config_spec
        )

    @property
    def uses_trl(self) -> bool:
        return self.settings.train.engine == "trl"

    def build_trainer(self) -> Trainer:
        """Return the engine's trainer; it creates the checkpoint folder."""
        return self._trl_trainer() if self.uses_trl else self._native_trainer()

    def _trl_trainer(self) -> Trainer:
        scale, train = self.settings.reward.margin_scale, self.data.train
        # As in `pairwise_margins`: a missing margin is 0, and none is negative.
        margins = None if scale is None else (scale * np.nan_to_num(train.margins)).clip(min=0).tolist()
        return build_trl_reward_trainer(
            self.policy.model,
            self.arguments(),
            self.text.encoder.tokenizer,
            train=train,
            held_out=self.data.held_out,
            pad_id=self.collator.pad_id,
            margins=margins,
        )

    def _native_trainer(self) -> RewardTrainer:
        train = self.settings.train
        hooks = adapter_hooks(self.policy.model, self.settings.adapter, steps=self.num_steps)
        trainer = RewardTrainer(
            self.policy.model,
            self.arguments(),
            train_rows=self.data.train,
            held_out_rows=self.data.held_out,
            collator=self.collator,
            batch_size=train.batch_size,
            group_by_length=train.group_by_length,
            hooks=hooks,
        )
        trainer.objective = replace(self.objective, forward_passes=hooks.forward_passes)
        trainer.held_out_metrics, trainer.group_metrics = self.evaluator.metrics, []
        return trainer

    @property
    def evaluator(self) -> RewardEvaluator:
        """Return the evaluation of this model and data."""
        batch_size, _ = auto_values.micro_batch_size(
            self.settings.train.micro_batch_size,
            batch_size=self.settings.train.batch_size,
            longest=int(self.data.train.lengths.max()),
            hardware=self.ctx.hardware,
        )
        return RewardEvaluator(
            self.policy.model,
            self.data,
            head_names=self.settings.reward.heads,
            head_of_source=tuple(head_indices(self.settings)),
            collator=self.collator,
            batch_size=batch_size,
        )

    def evaluate(self, when: str) -> None:
        """Evaluate the held-out comparisons ``before`` or ``after`` training and record the metrics.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
        samples = self.settings.evaluate.samples
        with self.ctx.timed("held_out"):
            self.evaluator.record(self.ctx.run, self.text.encoder, when, samples=samples)

    def save(self, trainer: Trainer) -> None:
        """Save adapter and head (or the full model), reload and verify them, and record the normalization.

        Raises:
            UserError: the saved weights differ from the trained ones, or a head's scores are constant.
        """
        save_policy(self.ctx, self.text, self.policy)
        record_training_metrics(self.ctx, trainer)
        with self.ctx.timed("held_out"):
            self.evaluator.record_normalization(self.ctx.run)
