"""Reward model training from a recipe: pre-flight checks, trainer, evaluation, saving."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import Trainer, TrainingArguments

from align.preference.attention import cost_of, why_separate
from align.preference.rows.dataset import PreparedPreferences
from align.preference.trl_engine import refuse_lists
from align.reward.checks import data_ticks, margins_tick, model_ticks
from align.reward.collate import RewardCollator
from align.reward.loading import pad_id
from align.reward.measuring import Measuring
from align.reward.model import input_embeddings
from align.reward.objective import Objective
from align.reward.settings import Settings, heads_of
from align.reward.trainer import RewardTrainer
from align.reward.trl_engine import reward_stage, trl_reward_trainer
from finetune.planning import choices
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.preflight.ticks import Tick
from finetune.training.text import Text
from finetune.training.tuning import (
    engine_arguments,
    optimizer_steps,
    policy_facts,
    record_training,
    save_policy,
    say_parameters,
)


@dataclass(frozen=True)
class RewardTuning:
    """Train a reward model on preference comparisons."""

    job: Job
    text: Text
    data: PreparedPreferences
    policy: Policy

    @property
    def settings(self) -> Settings:
        settings = self.job.recipe.settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def steps(self) -> int:
        """Return the total number of optimizer steps."""
        return optimizer_steps(self.job, len(self.data.train))

    @property
    def objective(self) -> Objective:
        """Return the training objective."""
        reward = self.settings.reward
        return Objective(tuple(heads_of(self.settings)), reward.centring, reward.margins)

    @cached_property
    def separate(self) -> str:
        """Return why the model cannot take a block mask; empty if completions can share their prompt."""
        groups = [rows for rows in (self.data.train, self.data.held_out) if rows is not None]
        reach = max(rows.longest for rows in groups) + self.text.virtual_tokens
        return why_separate(self.policy.model.config, reach=reach)

    @property
    def collator(self) -> RewardCollator:
        """Return the collator of the recipe's layout."""
        encoder = self.text.encoder
        pad, cost = pad_id(encoder.tokenizer, encoder.stop_ids), cost_of(self.policy.model)
        return RewardCollator(pad, separate=bool(self.separate), cost=cost)

    def facts(self) -> dict[str, Any]:
        """Validate the run, and return the run.json fields known before step 0."""
        self.arguments()
        say_parameters(self.job, self.policy)
        self.preflight()
        facts = policy_facts(self.job, self.text, self.policy, self.data.report)
        settings, room = self.settings, self.text.max_length
        facts["load"] |= {
            "heads": settings.reward.heads,
            "pad_id": self.collator.pad_id,
            "max_length": room,
            "max_prompt_length": settings.data.max_prompt_length or room // 2,
            "rules": [rule.model_dump() for rule in settings.reward.rules],
        }
        return facts

    def preflight(self) -> None:
        """Run the pre-flight checks on the run's rows and model; neither is changed.

        Raises:
            UserError: a check failed.
        """
        job, policy = self.job, self.policy
        if self.by_trl:
            refuse_lists(self.data.train, where="data.source")
            if self.data.held_out is not None:
                refuse_lists(self.data.held_out, where="data.held_out")
        with job.timed("preflight"):
            job.check(Tick("environment", job.environment(policy.precision)))
            if self.separate:
                job.check(Tick("layout", f"prompt sharing off: {self.separate}"))
            train, model = self.data.train, policy.model
            room = self.text.max_length
            job.check(*data_ticks(self.data, self.text.encoder, input_embeddings(model), max_length=room))
            if self.settings.reward.margins is not None:
                job.check(margins_tick(train, scale=self.settings.reward.margins))
            stored = {"precision": policy.precision, "quantization": policy.quantization}
            job.check(*model_ticks(model, train, self.objective, self.collator, **stored))

    def arguments(self) -> TrainingArguments:
        """Return the engine's arguments, with ``auto`` values resolved.

        Raises:
            UserError: the engine rejects them.
        """
        longest = int(self.data.train.lengths.max())
        stage = reward_stage(centring=self.settings.reward.centring)
        return engine_arguments(self.job, self.policy, longest=longest, steps=self.steps, stage=stage)

    @property
    def by_trl(self) -> bool:
        return self.settings.train.engine == "trl"

    def trainer(self) -> Trainer:
        """Return the engine's trainer; it creates the checkpoint folder."""
        return self._trl_trainer() if self.by_trl else self._native_trainer()

    def _trl_trainer(self) -> Trainer:
        scale, train = self.settings.reward.margins, self.data.train
        margins = None if scale is None else (scale * np.nan_to_num(train.margins)).clip(min=0).tolist()
        return trl_reward_trainer(
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
        hooks = adapter_hooks(self.policy.model, self.settings.adapter, steps=self.steps)
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
        trainer.objective = replace(self.objective, passes=hooks.passes)
        trainer.measure, trainer.seen = self.measuring.metrics, []
        return trainer

    @property
    def measuring(self) -> Measuring:
        """Return the evaluation of this model and data."""
        size, _ = choices.micro_batch_size(
            self.settings.train.micro_batch_size,
            batch_size=self.settings.train.batch_size,
            longest=int(self.data.train.lengths.max()),
            hardware=self.job.hardware,
        )
        return Measuring(
            self.policy.model,
            self.data,
            names=self.settings.reward.heads,
            heads=tuple(heads_of(self.settings)),
            collate=self.collator,
            size=size,
        )

    def measure(self, when: str) -> None:
        """Evaluate the held-out comparisons ``before`` or ``after`` training and record the metrics.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
        samples = self.settings.evaluate.samples
        with self.job.timed("held_out"):
            self.measuring.record(self.job.run, self.text.encoder, when, samples=samples)

    def save(self, trainer: Trainer) -> None:
        """Save adapter and head (or the full model), reload and verify them, and record the normalization.

        Raises:
            UserError: the saved weights differ from the trained ones, or a head's scores are constant.
        """
        save_policy(self.job, self.text, self.policy)
        record_training(self.job, trainer)
        with self.job.timed("held_out"):
            self.measuring.zero(self.job.run)
