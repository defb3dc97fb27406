"""RLOO and GRPO as a training method: trainer, checks and evaluation built from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isfinite
from typing import Any

from transformers import Trainer, TrainingArguments

from align.online.evaluation import HeldOutEvaluation, score_tokens
from align.online.loading import OnlineModels
from align.online.metric_spec import ONLINE_FIRST_LAST_METRICS
from align.online.settings import GRPOSettings, OnlineSettings, RLOOSettings
from align.online.trl_engine import (
    OnlineTrainer,
    TRLRewardFunction,
    as_trl_reference,
    build_online_trainer,
    prompt_order,
)
from align.preference.reference_policy import ReferencePolicy
from align.rl.completions import check_rewards
from align.rl.prompts import PreparedPrompts
from align.rl.rewards.loading import rewards_record
from align.rl.sampling import Sampling, sample_completions
from data_templates.segments import Message
from finetune.distributed.interrupts import NotFiniteError
from finetune.recipe.errors import Problem
from finetune.training import shared_steps
from finetune.training.arguments import TrlConfigSpec
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.model import Policy
from finetune.training.preflight.checks import CheckResult, failed
from finetune.training.samples import Samples, evenly_spaced
from finetune.training.text_encoding import TextEncoding

NUM_PROBES = 4
"""Number of prompts, and of completion tokens each, on which reference and policy are compared."""
TRL_REFERENCE_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Tolerance between reference and initial policy by precision, nats per token: rounding alone."""


@dataclass(frozen=True)
class OnlineRL:
    """RLOO or GRPO on rewards of groups of the policy's own completions."""

    ctx: RunContext
    text: TextEncoding
    data: PreparedPrompts
    models: OnlineModels
    loss_settings: RLOOSettings | GRPOSettings

    @property
    def settings(self) -> OnlineSettings:
        """Return the recipe's settings."""
        settings = self.ctx.recipe.settings
        assert isinstance(settings, OnlineSettings)
        return settings

    @property
    def policy(self) -> Policy:
        """Return the trained policy."""
        return self.models.policy

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run."""
        return shared_steps.num_optimizer_steps(
            self.ctx, len(self.data.train) * self.settings.sampling.num_generations
        )

    @property
    def samples(self) -> Samples:
        """Return the sample prompts, answered before and after training."""
        return shared_steps.build_samples(self.ctx, self.text, self.data.prompts)

    @cached_property
    def generation_eval(self) -> GenerationEval:
        """Return the evaluation of greedy generations, before and after training."""
        return shared_steps.build_generation_eval(self.ctx, self.text, self.data.prompts)

    @cached_property
    def held_out_evaluation(self) -> HeldOutEvaluation | None:
        """Return the evaluation on held-out prompts, or None."""
        settings, rows = self.settings, self.data.held_out
        if rows is None:
            return None
        return HeldOutEvaluation(
            [rows[index] for index in evenly_spaced(len(rows), settings.evaluate.grader_rows)],
            self.policy,
            self.reference_policy,
            self.models.rewards,
            self.text.encoder,
            self._sampling_parameters(),
            settings.train.seed,
            self.training_arguments().per_device_train_batch_size,
        )

    @cached_property
    def reference_policy(self) -> ReferencePolicy:
        """Return the reference policy: the initial weights, so access it before a checkpoint is loaded."""
        return ReferencePolicy(self.policy.model)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that run.json records before the first step, after all checks."""
        # For its checks: invalid arguments are reported before anything is sampled.
        self.training_arguments()
        self.ctx.add_summary_metrics(self.generation_eval.summary)
        shared_steps.log_parameter_counts(self.ctx, self.policy)
        self.ctx.check(
            CheckResult("environment", self.ctx.describe_environment(self.policy.precision)),
            check_rewards(self.models.rewards, self.data),
        )
        metadata = shared_steps.policy_metadata(self.ctx, self.text, self.policy, self.data.report)
        return {**metadata, "rewards": rewards_record(self.settings.rewards)}

    def training_arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: TRL rejects them.
        """
        sampling = self.settings.sampling
        trl_arguments = self.loss_settings.trl_arguments | {
            "temperature": sampling.temperature,
            "max_completion_length": sampling.max_new_tokens,
            "num_generations": sampling.num_generations,
        }
        stage = TrlConfigSpec(self.settings.TRL_CONFIG, trl_arguments)
        max_length = max(self.data.train.lengths) + sampling.max_new_tokens
        arguments = shared_steps.engine_arguments(
            self.ctx, self.policy, longest=max_length, steps=self.num_steps, stage=stage
        )
        # The dataset is the prompt order of the complete run: the Trainer's epochs mean nothing here.
        arguments.max_steps = self.num_steps
        return arguments

    def build_trainer(self) -> OnlineTrainer:
        """Return TRL's trainer, after checking that its reference equals the initial policy.

        Raises:
            UserError: they differ.
        """
        train, prompts = self.settings.train, self.data.train
        prompts_per_step = train.batch_size // self.settings.sampling.num_generations
        # Copies the initial weights now (a cached property): training, or a checkpoint, will overwrite them.
        assert self.reference_policy.initial_weights, (
            "the initial weights are copied before training or loading"
        )
        trainer = build_online_trainer(
            self.policy.model,
            self.training_arguments(),
            TRLRewardFunction(self.models.rewards, prompts, self.text.encoder),
            order=prompt_order(
                prompts.lengths,
                count=self.num_steps * prompts_per_step,
                seed=train.seed,
                group_by_length=train.group_by_length,
                prompts_per_step=prompts_per_step,
            ),
            evaluate_held_out=self._held_out_metrics if self.held_out_evaluation is not None else None,
        )
        # Without KL TRL keeps no reference.
        if self.loss_settings.beta:
            self._check_reference()
        return trainer

    def generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        """Generate greedily with the current policy."""
        return shared_steps.generate_sharded(self.ctx, self.text, self.policy, prompts)

    def evaluate(self, trainer: Trainer, when: str) -> None:
        """Record held-out metrics, and after training the first and last training metrics.

        Raises:
            NotFiniteError: a metric is NaN or infinite.
        """
        run = self.ctx.run
        # A resumed run does not repeat an evaluation that is recorded.
        recorded = run.record.get("metrics", {})
        if self.held_out_evaluation is not None and f"{EVAL_PREFIX}objective/reward_{when}" not in recorded:
            with self.ctx.timed("held_out"):
                metrics = self._held_out_metrics()
            for name, value in metrics.items():
                if not isfinite(value):
                    raise NotFiniteError(f"{name} is {value} {when} training")
            run.update(metrics={f"{name}_{when}": value for name, value in metrics.items()})
        if when == "after":
            shared_steps.record_training_metrics(self.ctx, trainer, ONLINE_FIRST_LAST_METRICS)

    def save(self) -> None:
        """Save the adapter (or the model), reload it to verify, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        shared_steps.save_policy(self.ctx, self.text, self.policy)

    def _check_reference(self) -> None:
        """Check that TRL's reference equals the initial policy, including its adapter."""
        model, prompts = self.policy.model, self.data.train.rows[:NUM_PROBES]
        # A few tokens are enough: other weights change the log-probability of every token.
        sampling = replace(self._sampling_parameters(), max_new_tokens=NUM_PROBES)
        ids = [prompt.ids for prompt in prompts]
        stats = score_tokens(
            self.policy,
            prompts,
            sample_completions(model, ids, sampling=sampling, seed=self.settings.train.seed),
            sampling=sampling,
            micro_batch_size=NUM_PROBES,
            as_reference=partial(as_trl_reference, model),
        )
        difference = float((stats.logps - stats.reference_logps).abs().max())
        if difference > TRL_REFERENCE_TOLERANCE[self.policy.precision]:
            method = self.settings.adapter.method
            actual = (
                f"with adapter.method '{method}' reference log-probabilities differ by {difference:.2g} nats"
            )
            expected = "a reference equal to the initial policy"
            problem = Problem(
                f"{self.loss_settings.SECTION}.beta",
                actual,
                expected,
                f"{self.loss_settings.SECTION}.beta=0, or adapter.method=lora",
            )
            self.ctx.check(failed("start", problem))
        agreement = "exactly" if not difference else f"within {difference:.1g} nats per token"
        self.ctx.check(CheckResult("start", f"policy equals reference before step 0 ({agreement})"))

    def _sampling_parameters(self) -> Sampling:
        stop_ids = self.text.encoder.stop_ids
        return Sampling.from_settings(self.ctx.hardware.device, self.settings.sampling, stop_ids=stop_ids)

    def _held_out_metrics(self) -> dict[str, float]:
        assert self.held_out_evaluation is not None
        return {f"{EVAL_PREFIX}{name}": value for name, value in self.held_out_evaluation.evaluate().items()}
