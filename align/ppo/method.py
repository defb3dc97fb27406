"""PPO as a training method: trainer, checks, evaluation and diagnostics built from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from transformers import Trainer, TrainingArguments

from align.ppo import diagnostics
from align.ppo.experience import Rollouts
from align.ppo.loading import PPOModels, value_init_run
from align.ppo.pretraining import PretrainingMix
from align.ppo.stage_settings import Settings
from align.ppo.state import PPOState, PPOStateCallback
from align.ppo.stop_rule import Metrics, RewardHackingStop
from align.ppo.trainer import PPOTrainer
from align.preference.reference_policy import ReferencePolicy
from align.rl.completions import ScoredCompletions, check_rewards
from align.rl.maths.kl import AdaptiveKLController, FixedKLController
from align.rl.prompts import PreparedPrompts
from align.rl.rewards.loading import rewards_record
from align.rl.sampling import Sampling
from data_templates.segments import Message
from finetune.adapters.traits import Hooks
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import tokenize_conversations
from finetune.data.load import SourceSpec, load_source
from finetune.data.report import DataReport
from finetune.distributed import collectives
from finetune.recipe.errors import Problem
from finetune.recipe.settings import DataSettings
from finetune.training import shared_steps
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval, mean_grade
from finetune.training.loading import Policy
from finetune.training.metrics import EVAL_PREFIX, GOLD_PREFIX
from finetune.training.model import count_parameters
from finetune.training.preflight.checks import CheckResult, failed
from finetune.training.samples import Samples, evenly_spaced, prompt_text
from finetune.training.text_encoding import TextEncoding

PPO_FIRST_LAST_METRICS = (
    "loss",
    "objective/reward",
    "objective/shaped_reward",
    "objective/kl_per_completion",
    "policy/entropy",
    "val/completion_length",
    "val/eos_rate",
    "policy/clip_frac",
    "value/explained_variance",
)
"""Training metrics that run.json records for the first and the last rollouts."""
RATIO_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
"""Tolerance of the first ratios by precision: kernels with and without gradients may round differently."""


@dataclass(frozen=True)
class PPO:
    """PPO on rewards of the policy's own completions."""

    ctx: RunContext
    text: TextEncoding
    data: PreparedPrompts
    models: PPOModels

    @property
    def settings(self) -> Settings:
        """Return the recipe's settings."""
        settings = self.ctx.recipe.settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def policy(self) -> Policy:
        """Return the trained policy, the model that is saved."""
        return self.models.policy

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run: rollouts x PPO epochs x minibatches."""
        train, ppo = self.settings.train, self.settings.ppo
        num_rollouts = max(1, ceil(train.epochs * len(self.data.train) / ppo.rollout_size))
        return train.max_steps or num_rollouts * ppo.ppo_epochs * (ppo.rollout_size // train.batch_size)

    @property
    def samples(self) -> Samples:
        """Return the sample prompts, answered before and after training."""
        return shared_steps.build_samples(self.ctx, self.text, self.data.conversations)

    @cached_property
    def generation_eval(self) -> GenerationEval:
        """Return the evaluation of greedy generations, before and after training."""
        return shared_steps.build_generation_eval(self.ctx, self.text, self.data.conversations)

    @cached_property
    def hooks(self) -> Hooks:
        """Return the adapter's training hooks, and the learning rate factors of the value model."""
        settings = self.settings
        hooks = adapter_hooks(self.policy.model, settings.adapter, steps=self.num_steps)
        # The adapter names parameters of the policy, which is a submodule of the actor-critic.
        factors = {f"policy.{name}": factor for name, factor in hooks.lr_factors.items()}
        if settings.ppo.value_learning_rate is not None:
            factor = settings.ppo.value_learning_rate / settings.train.learning_rate
            # Factors relative to train.learning_rate: one optimizer and one schedule for both models.
            names = [
                name for name, weight in self.models.actor_critic.named_parameters() if weight.requires_grad
            ]
            factors |= {name: factor for name in names if name.startswith("value.")}
        return replace(hooks, lr_factors=factors)

    @cached_property
    def pretraining_mix(self) -> PretrainingMix | None:
        """Return the tokenized rows of PPO-ptx, or None.

        Raises:
            UserError: the rows cannot be read.
        """
        settings, encoder = self.settings, self.text.encoder
        mix_settings = settings.pretraining
        if mix_settings.source is None:
            return None
        report, max_length = DataReport(), self.text.max_length
        spec = SourceSpec("pretraining.source", mix_settings.source, "train", None, None)
        rows = load_source(spec, report, seed=settings.train.seed)
        reports = report, DataReport()
        data = tokenize_conversations(
            rows, [], DataSettings(), encoder, max_length=max_length, reports=reports
        )
        self.ctx.log(f"pretraining: {'; '.join(report.lines())}")
        collator = PaddedCollator(encoder.stop_ids[0])
        return PretrainingMix(
            data.train, collator, mix_settings.batch_size, mix_settings.weight, settings.train.seed
        )

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that run.json records before the first step, after all checks."""
        # For its checks: invalid arguments are reported before anything is sampled.
        self.training_arguments()
        self.ctx.add_summary_metrics(self.generation_eval.summary)
        self._log_parameter_counts()
        self.ctx.check(
            CheckResult("environment", self.ctx.describe_environment(self.policy.precision)),
            check_rewards(self.models.rewards, self.data),
        )
        self.ctx.resolve_auto("train.max_steps", (self.num_steps, "optimizer steps of all rollouts"))
        # Reads the rows (a cached property): a file that cannot be read stops the run before the first step.
        assert self.pretraining_mix is None or len(self.pretraining_mix.rows)
        metadata = shared_steps.policy_metadata(self.ctx, self.text, self.policy, self.data.report)
        return {**metadata, "rewards": rewards_record(self.settings.rewards)}

    def training_arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: transformers rejects them.
        """
        max_length = max(self.data.train.lengths) + self.settings.sampling.max_new_tokens
        arguments = shared_steps.engine_arguments(
            self.ctx, self.policy, longest=max_length, steps=self.num_steps
        )
        # PPO counts its own steps: epochs of the Trainer would count prompts.
        arguments.max_steps = self.num_steps
        return arguments

    def build_trainer(self) -> Trainer:
        """Return the trainer; the reference is the policy as it is now."""
        settings, args, ppo = self.settings, self.training_arguments(), self.settings.ppo
        # A checkpoint replaces these values when training resumes.
        ppo_state = PPOState(FixedKLController(ppo.kl_coef))
        if ppo.adaptive_kl_target is not None:
            ppo_state.kl_controller = AdaptiveKLController(
                ppo.kl_coef, ppo.adaptive_kl_target, ppo.kl_horizon
            )
        trainer = PPOTrainer(
            self.models.actor_critic,
            args,
            train_rows=self.data.train,
            held_out_rows=self.data.held_out,
            collator=list,  # rows are prompts; batches are built from the rollout
            batch_size=settings.train.batch_size,
            group_by_length=settings.train.group_by_length,
            hooks=self.hooks,
        )
        trainer.ppo, trainer.ppo_state, trainer.pretraining = ppo, ppo_state, self.pretraining_mix
        trainer.rollouts = self._build_rollouts(args.per_device_train_batch_size)
        if self.data.held_out is not None:
            held_out = self.data.held_out
            trainer.held_out_prompts = [
                held_out[index] for index in evenly_spaced(len(held_out), settings.evaluate.grader_rows)
            ]
        trainer.grader_metrics, trainer.check_initial_ratio = self._grader_metrics, self._check_initial_ratio
        # Before the recorder that `RunContext.fit` adds: it writes the checksums of a checkpoint's files.
        trainer.add_callback(PPOStateCallback(ppo_state))
        trainer.add_callback(
            RewardHackingStop(
                settings.stop,
                first_metrics=lambda: ppo_state.first_metrics,
                history=self._held_out_history,
                on_stop=self._log_stop,
            )
        )
        return trainer

    def generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        """Generate greedily with the current policy."""
        return shared_steps.generate_sharded(self.ctx, self.text, self.policy, prompts)

    def evaluate(self, trainer: Trainer, when: str) -> None:
        """Record held-out metrics, and after training the first and last training metrics."""
        assert isinstance(trainer, PPOTrainer)
        run = self.ctx.run
        # A resumed run does not repeat an evaluation that is recorded.
        if trainer.held_out_prompts and f"{EVAL_PREFIX}objective/reward_{when}" not in run.record.get(
            "metrics", {}
        ):
            with self.ctx.timed("held_out"):
                metrics = trainer.held_out_metrics()
            run.update(metrics={f"{EVAL_PREFIX}{name}_{when}": value for name, value in metrics.items()})
        if when == "after":
            shared_steps.record_training_metrics(self.ctx, trainer, PPO_FIRST_LAST_METRICS)

    def save(self) -> None:
        """Save the policy's adapter (or the model), reload it to verify, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        shared_steps.save_policy(self.ctx, self.text, self.policy)

    def diagnose(self) -> None:
        """Log and record the diagnostics of the run."""
        run = self.ctx.run
        completions = [(entry["before"], entry["after"]) for entry in run.samples()]
        findings = diagnostics.diagnose_ppo(run.record["metrics"], completions)
        for finding in findings:
            self.ctx.log(finding.format_line())
        run.update(diagnostics=[finding.record() for finding in findings])

    def _build_rollouts(self, micro_batch_size: int) -> Rollouts:
        sampling, encoder = self.settings.sampling, self.text.encoder
        return Rollouts(
            self.models.actor_critic,
            ReferencePolicy(self.policy.model),
            self.models.rewards,
            encoder,
            Sampling.from_settings(self.ctx.hardware.device, sampling, stop_ids=encoder.stop_ids),
            self.policy.precision,
            micro_batch_size,
        )

    def _grader_metrics(self, completions: ScoredCompletions) -> dict[str, float]:
        """Return the mean of each grader (gold reward), which the run does not maximize."""
        graders = self.generation_eval.graders
        prompts = [
            prompt_text([*prompt.messages, Message("assistant", "")]) for prompt in completions.prompts
        ]
        return {
            f"{GOLD_PREFIX}{name}": mean_grade(name, grader, prompts, completions.texts)
            for name, grader in graders.items()
        }

    def _held_out_history(self) -> list[Metrics]:
        """Return all held-out metrics so far, from before training on, as read by rank 0."""
        # Only rank 0 has the metrics file, and all ranks must agree on whether to stop.
        return collectives.broadcast_object(self._recorded_history() if self.ctx.dist.is_main else [])

    def _recorded_history(self) -> list[Metrics]:
        run = self.ctx.run
        metrics = run.record["metrics"]
        # The metrics before training are in run.json alone; metrics.jsonl has those of evaluations since.
        before = {name.removesuffix("_before"): value for name, value in metrics.items() if "_before" in name}
        entries = [
            before,
            *(entry for entry in run.metrics() if f"{EVAL_PREFIX}objective/reward" in entry),
        ]
        return [{name.removeprefix(EVAL_PREFIX): value for name, value in entry.items()} for entry in entries]

    def _check_initial_ratio(self, error: float) -> None:
        """Check once that the first update's ratios to the sampling policy are 1."""
        if any(result["name"] == RATIO_CHECK for result in self.ctx.check_results):
            return
        tolerance = RATIO_TOLERANCE[self.policy.precision]
        if error > tolerance:
            actual = f"ratios of the first update differ from 1 by up to {error:.2g}"
            problem = Problem("model", actual, f"at most {tolerance:g}: the policy has not changed yet")
            self.ctx.check(failed(RATIO_CHECK, problem))
        summary = "exactly 1" if error == 0 else f"1 within {error:.1g}"
        self.ctx.check(
            CheckResult(RATIO_CHECK, f"ratio to the sampling policy is {summary} on the first update")
        )

    def _log_parameter_counts(self) -> None:
        """Log the trainable parameters of policy and value, and how the value is initialized."""
        counts = count_parameters(self.models.actor_critic)
        policy_trained = count_parameters(self.policy.model).trained
        init_run = value_init_run(self.settings)
        value_init = "the initial policy with a zero head" if init_run is None else f"{init_run[0]}"
        self.ctx.log(
            f"trainable parameters: policy {policy_trained:,}, value {counts.trained - policy_trained:,} "
            f"(initialized from {value_init}); {counts.total:,} in total with the shared base"
        )
        if self.models.actor_critic.had_dropout:
            self.ctx.log("dropout is off: the ratio to the sampling policy must start at 1")

    def _log_stop(self, reason: str) -> None:
        self.ctx.log(reason)
        self.ctx.run.update(stop_reason=reason)


RATIO_CHECK = "ratio"
