"""Reward model: trains a scalar score on human preferences (Bradley-Terry), on pairs or ranked lists.

The loss is the mean negative log-likelihood of the preferences (Ouyang et al. 2022, arXiv 2203.02155,
equation 1; Touvron et al. 2023, arXiv 2307.09288, equation 2): L = -(1/N) sum_n log s(r(x, y_w) - r(x, y_l) -
m), over all pairs of a ranked list at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from align.reward.diagnostics import diagnose_reward, reward_metric_spec
from align.reward.settings import RULES as RULES
from align.reward.settings import Settings, head_indices

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from align.preference.rows.dataset import PreparedPreferences
    from align.reward.batch import RewardCollator
    from align.reward.evaluation import RewardEvaluator
    from align.reward.trainer import RewardObjective
    from finetune.training.context import RunContext
    from finetune.training.findings import Finding
    from finetune.training.metric_specs import MetricSpec, When
    from finetune.training.model import Policy, TextEncoding
    from finetune.training.stage import Method

PUBLIC = "hh"
"""Default recipe for bases other than the bundled one."""


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, comparisons and model.

    Raises:
        UserError: the data are invalid, or the base cannot be loaded or has no sequence classification model.
    """
    from align.preference.rows.prepare import load_preferences
    from align.reward.model import load_reward_model_for_training
    from finetune.training.loading import load_text_encoding

    text = load_text_encoding(ctx)
    use_margin = ctx.settings.reward.margin_scale is not None
    data = load_preferences(ctx, ctx.settings.data, text, use_margin=use_margin)
    return RewardModeling(ctx, text, data, load_reward_model_for_training(ctx, text.encoder))


@dataclass(frozen=True)
class RewardModeling:
    """Train a base with a score head to score the preferred completion of a prompt higher."""

    ctx: RunContext[Settings]
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy

    @property
    def metric_spec(self) -> MetricSpec:
        return reward_metric_spec(self.ctx.settings)

    @cached_property
    def objective(self) -> RewardObjective:
        """Return the loss: each data source trains its head."""
        from align.reward.trainer import RewardObjective

        reward = self.ctx.settings.reward
        heads = tuple(head_indices(self.ctx.settings))
        return RewardObjective(heads, reward.center_rewards_coefficient, reward.margin_scale)

    @cached_property
    def block_mask_unsupported(self) -> str:
        """Return why the model cannot take a block mask; empty if completions can share their prompt."""
        from align.preference.attention import block_mask_unsupported

        datasets = [rows for rows in (self.data.train, self.data.held_out) if rows is not None]
        max_positions = max(rows.longest for rows in datasets) + self.text.virtual_tokens
        return block_mask_unsupported(self.policy.model.config, max_positions=max_positions)

    @cached_property
    def collator(self) -> RewardCollator:
        """Return the collator: completions share their prompt's row where the model can separate them."""
        from align.preference.attention import forward_cost
        from align.reward.batch import RewardCollator
        from align.reward.model import non_stop_pad_id

        encoder = self.text.encoder
        pad_id, cost = non_stop_pad_id(encoder.tokenizer, encoder.stop_ids), forward_cost(self.policy.model)
        return RewardCollator(pad_id, one_per_row=bool(self.block_mask_unsupported), cost=cost)

    @cached_property
    def evaluator(self) -> RewardEvaluator:
        """Return the evaluation of this model and data."""
        from align.reward.evaluation import RewardEvaluator
        from finetune.training import auto_values

        settings = self.ctx.settings
        batch_size, _ = auto_values.micro_batch_size(
            settings.train.micro_batch_size,
            batch_size=settings.train.batch_size,
            longest=int(self.data.train.lengths.max()),
            hardware=self.ctx.hardware,
        )
        return RewardEvaluator(
            self.policy.model,
            self.data,
            head_names=settings.reward.heads,
            head_of_source=tuple(head_indices(settings)),
            collator=self.collator,
            batch_size=batch_size,
        )

    def prepare(self) -> dict[str, Any]:
        """Check comparisons and model, without changing either; return what scoring after training needs.

        Raises:
            UserError: a check failed.
        """
        from align.preference.rows.row_checks import require_pairs
        from align.reward.model import find_input_embeddings
        from align.reward.preflight import check_data, check_margins, check_reward_model
        from finetune.training.preflight.checks import CheckResult
        from finetune.training.stage import check_policy

        ctx, data, policy, max_length = self.ctx, self.data, self.policy, self.text.max_length
        reward = ctx.settings.reward
        with ctx.timed("preflight"):
            check_policy(ctx, policy)
            if ctx.settings.train.engine == "trl":  # the native trainer takes ranked lists too
                require_pairs(data)
            if self.block_mask_unsupported:
                ctx.check(CheckResult("layout", f"prompt sharing off: {self.block_mask_unsupported}"))
            embeddings = find_input_embeddings(policy.model)
            ctx.check(*check_data(data, self.text.encoder, embeddings, max_length=max_length))
            if reward.margin_scale is not None:
                ctx.check(check_margins(data.train, scale=reward.margin_scale))
            ctx.check(*check_reward_model(policy, data.train, self.objective, self.collator))
        return {
            "reload": {
                "heads": reward.heads,
                "pad_id": self.collator.pad_id,
                "max_length": max_length,
                "max_prompt_length": ctx.settings.data.max_prompt_length or max_length // 2,
                "rules": [rule.model_dump() for rule in reward.rules],
            }
        }

    def training_arguments(self, num_steps: int) -> TrainingArguments:
        """Return the engine's training arguments, with ``auto`` values resolved.

        Raises:
            UserError: the engine refuses them.
        """
        from align.engines.trl.reward import reward_config
        from finetune.training.arguments import resolve_arguments

        coefficient = self.ctx.settings.reward.center_rewards_coefficient
        return resolve_arguments(
            self.ctx,
            self.policy,
            longest=int(self.data.train.lengths.max()),
            steps=num_steps,
            trl_config=reward_config(center_rewards_coefficient=coefficient),
        )

    def build_trainer(self, args: TrainingArguments, num_steps: int) -> Trainer:
        """Save the rules' files, and return the engine's trainer, which creates the checkpoint folder."""
        from align.engines.trl.reward import TrlRewardTrainer, scaled_margins
        from align.reward.function_reward import save_rules
        from align.reward.trainer import RewardTrainer
        from finetune.training.adapter_hooks import adapter_hooks
        from finetune.training.trainer import TrainerData

        settings, model, data = self.ctx.settings, self.policy.model, self.data
        train, scale = settings.train, settings.reward.margin_scale
        save_rules(settings.reward.rules, self.ctx.run)
        if train.engine == "trl":
            return TrlRewardTrainer(
                model,
                args,
                self.text.encoder.tokenizer,
                train=data.train,
                held_out=data.held_out,
                pad_id=self.collator.pad_id,
                margins=None if scale is None else scaled_margins(data.train, scale),
            )
        hooks = adapter_hooks(model, settings.adapter, steps=num_steps)
        return RewardTrainer(
            model,
            args,
            TrainerData(data.train, data.held_out, self.collator, train.batch_size, train.group_by_length),
            hooks=hooks,
            objective=replace(self.objective, forward_passes=hooks.forward_passes),
            evaluator=self.evaluator,
        )

    def evaluate(self, trainer: Trainer, when: When) -> dict[str, float]:
        """Return held-out loss, accuracy (also per head) and margin; record scores of some comparisons.

        After training also the normalization is recorded: L is invariant to a constant added to all scores.

        Raises:
            NotFiniteError: a score is NaN or infinite.
            UserError: a head gives every completion the same score.
        """
        if when == "after":
            self.evaluator.record_normalization(self.ctx.run)
        num_samples = self.ctx.settings.evaluate.samples
        return self.evaluator.record(self.ctx.run, self.text.encoder, when, samples=num_samples)

    def diagnose(self) -> list[Finding]:
        """Return the finding on held-out accuracy."""
        held_out = self.data.held_out
        metrics = self.ctx.run.record["metrics"]
        return diagnose_reward(metrics, 0 if held_out is None else len(held_out))
