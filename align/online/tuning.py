"""RLOO and GRPO as a training method: trainer, checks and evaluation built from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isfinite
from typing import Any

from transformers import Trainer, TrainingArguments

from align.online.loading import Judged
from align.online.measuring import HeldOut, read
from align.online.settings import GrpoSettings, OnlineSettings, RlooSettings
from align.online.trl_engine import Judging, OnlineTrainer, as_reference, online_trainer, prompt_order
from align.online.watched import AT_BOTH_ENDS, HELD_OUT
from align.preference.starting_policy import StartingPolicy
from align.rl.prompts import PreparedPrompts
from align.rl.replies import try_rewards
from align.rl.rewards.loading import rewards_record
from align.rl.rollout import Sampling, sample
from data_templates._segments import Message
from finetune.recipe.errors import Problem
from finetune.training import tuning
from finetune.training.arguments import TrlStage
from finetune.training.behaviour import Behaviour
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.samples import Samples, spread
from finetune.training.stops import NotFiniteError
from finetune.training.text import Text

PROBED = 4
"""Number of prompts, and of completion tokens each, on which reference and policy are compared."""
START = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Tolerance between reference and initial policy by precision, nats per token: rounding alone."""


@dataclass(frozen=True)
class OnlineTuning:
    """RLOO or GRPO on rewards of groups of the policy's own completions."""

    job: Job
    text: Text
    data: PreparedPrompts
    judged: Judged
    align: RlooSettings | GrpoSettings

    @property
    def settings(self) -> OnlineSettings:
        """Return the recipe's settings."""
        settings = self.job.recipe.settings
        assert isinstance(settings, OnlineSettings)
        return settings

    @property
    def policy(self) -> Policy:
        """Return the trained policy."""
        return self.judged.policy

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the run."""
        return tuning.optimizer_steps(self.job, len(self.data.train) * self.settings.sampling.samples)

    @property
    def samples(self) -> Samples:
        """Return the sample prompts, answered before and after training."""
        return tuning.samples_of(self.job, self.text, self.data.conversations)

    @cached_property
    def behaviour(self) -> Behaviour:
        """Return the evaluation of greedy generations, before and after training."""
        return tuning.behaviour_of(self.job, self.text, self.data.conversations)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """Return the evaluation on held-out prompts, or None."""
        settings, rows = self.settings, self.data.held_out
        if rows is None:
            return None
        return HeldOut(
            [rows[index] for index in spread(len(rows), settings.evaluate.judge_rows)],
            self.policy,
            self.start,
            self.judged.rewards,
            self.text.encoder,
            self._sampling(),
            settings.train.seed,
            self.arguments().per_device_train_batch_size,
        )

    @cached_property
    def start(self) -> StartingPolicy:
        """Return the reference policy: the initial weights, so access it before a checkpoint is loaded."""
        return StartingPolicy(self.policy.model)

    def facts(self) -> dict[str, Any]:
        """Return the metadata that run.json records before the first step, after all checks."""
        self.arguments()
        self.job.watch(self.behaviour.numbers)
        tuning.say_parameters(self.job, self.policy)
        self.job.check(
            Tick("environment", self.job.environment(self.policy.precision)),
            try_rewards(self.judged.rewards, self.data),
        )
        facts = tuning.policy_facts(self.job, self.text, self.policy, self.data.report)
        return {**facts, "rewards": rewards_record(self.settings.reward)}

    def arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: TRL rejects them.
        """
        sampling = self.settings.sampling
        own = self.align.arguments | {
            "temperature": sampling.temperature,
            "max_completion_length": sampling.max_new_tokens,
            "num_generations": sampling.samples,
        }
        stage = TrlStage(self.settings.TRL_CONFIG, own)
        longest = max(self.data.train.lengths) + sampling.max_new_tokens
        arguments = tuning.engine_arguments(
            self.job, self.policy, longest=longest, steps=self.steps, stage=stage
        )
        # Our prompt order is that of the complete run, as one epoch.
        arguments.max_steps = self.steps
        return arguments

    def trainer(self) -> OnlineTrainer:
        """Return TRL's trainer, after checking that its reference equals the initial policy.

        Raises:
            UserError: they differ.
        """
        train, prompts = self.settings.train, self.data.train
        together = train.batch_size // self.settings.sampling.samples
        assert self.start.copies, "the initial weights are copied before training or loading"
        trainer = online_trainer(
            self.policy.model,
            self.arguments(),
            Judging(self.judged.rewards, prompts, self.text.encoder),
            order=prompt_order(
                prompts.lengths,
                count=self.steps * together,
                seed=train.seed,
                group_by_length=train.group_by_length,
                together=together,
            ),
            held_out=self._measured if self.held_out is not None else None,
        )
        # Without KL TRL keeps no reference.
        if self.align.beta:
            self._check_start()
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Generate greedily with the current policy."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record held-out metrics, and after training the first and last training metrics.

        Raises:
            NotFiniteError: a metric is NaN or infinite.
        """
        run = self.job.run
        known = run.record.get("metrics", {})
        if self.held_out is not None and f"{HELD_OUT}reward_{when}" not in known:
            with self.job.timed("held_out"):
                found = self._measured()
            for name, value in found.items():
                if not isfinite(value):
                    raise NotFiniteError(f"{name} is {value} {when} training")
            run.update(metrics={f"{name}_{when}": value for name, value in found.items()})
        if when == "after":
            tuning.record_training(self.job, trainer, AT_BOTH_ENDS)

    def save(self) -> None:
        """Save the adapter (or the model), reload it to verify, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def _check_start(self) -> None:
        """Check that TRL's reference equals the initial policy, including its adapter."""
        model, prompts = self.policy.model, self.data.train.rows[:PROBED]
        sampling = replace(self._sampling(), max_new_tokens=PROBED)
        ids = [prompt.ids for prompt in prompts]
        said = read(
            self.policy,
            prompts,
            sample(model, ids, sampling=sampling, seed=self.settings.train.seed),
            sampling=sampling,
            size=PROBED,
            reference=partial(as_reference, model),
        )
        apart = float((said.logps - said.reference_logps).abs().max())
        if apart > START[self.policy.precision]:
            method = self.settings.adapter.method
            found = f"with adapter.method '{method}' reference log-probabilities differ by {apart:.2g} nats"
            expected = "a reference equal to the initial policy"
            problem = Problem("align.beta", found, expected, "align.beta=0, or adapter.method=lora")
            self.job.check(failed("start", problem))
        at = "exactly" if not apart else f"within {apart:.1g} nats per token"
        self.job.check(Tick("start", f"policy equals reference before step 0 ({at})"))

    def _sampling(self) -> Sampling:
        stops = self.text.encoder.stop_ids
        return Sampling.on(self.job.hardware.device, self.settings.sampling, stop_ids=stops)

    def _measured(self) -> dict[str, float]:
        assert self.held_out is not None
        return {f"{HELD_OUT}{name}": value for name, value in self.held_out.measure().items()}
