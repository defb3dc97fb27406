"""PPO as a training method: trainer, checks, evaluation and diagnostics built from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from transformers import Trainer, TrainingArguments

from align.ppo import panel
from align.ppo.experience import Collector
from align.ppo.loading import Cast, value_run
from align.ppo.pretraining import Pretraining
from align.ppo.progress import KeepProgress, Progress
from align.ppo.stage_settings import Settings
from align.ppo.stop_rule import GOLD, Numbers, StopWhenSpoilt
from align.ppo.trainer import HELD_OUT, PpoTrainer
from align.preference.starting_policy import StartingPolicy
from align.rl.maths.kl import AdaptiveKl, FixedKl
from align.rl.prompts import PreparedPrompts
from align.rl.replies import Replies, try_rewards
from align.rl.rewards.loading import rewards_record
from align.rl.rollout import Sampling
from data_templates._segments import Message
from finetune.adapters._traits import Hooks
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import prepare_gathered
from finetune.data.gather import Place, read_conversations
from finetune.data.report import DataReport
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings
from finetune.training import processes, tuning
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.behaviour import Behaviour, mean_judgement
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.model import count_parameters
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.samples import Samples, question_of, spread
from finetune.training.text import Text

AT_BOTH_ENDS = ("loss", "reward", "score", "kl", "entropy", "length", "ends", "clipped", "explained_variance")
"""Training metrics that run.json records for the first and the last rollouts."""
AT_ONE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
"""Tolerance of the first ratios by precision: kernels with and without gradients may round differently."""


@dataclass(frozen=True)
class PpoTuning:
    """PPO on rewards of the policy's own completions."""

    job: Job
    text: Text
    data: PreparedPrompts
    cast: Cast

    @property
    def settings(self) -> Settings:
        """Return the recipe's settings."""
        settings = self.job.recipe.settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def policy(self) -> Policy:
        """Return the trained policy, the model that is saved."""
        return self.cast.policy

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the run: rollouts x PPO epochs x minibatches."""
        train, ppo = self.settings.train, self.settings.ppo
        rollouts = max(1, ceil(train.epochs * len(self.data.train) / ppo.rollout_size))
        return train.max_steps or rollouts * ppo.epochs * (ppo.rollout_size // train.batch_size)

    @property
    def samples(self) -> Samples:
        """Return the sample prompts, answered before and after training."""
        return tuning.samples_of(self.job, self.text, self.data.conversations)

    @cached_property
    def behaviour(self) -> Behaviour:
        """Return the evaluation of greedy generations, before and after training."""
        return tuning.behaviour_of(self.job, self.text, self.data.conversations)

    @cached_property
    def hooks(self) -> Hooks:
        """Return the adapter's training hooks, and the learning rate factors of the value model."""
        settings = self.settings
        hooks = adapter_hooks(self.policy.model, settings.adapter, steps=self.steps)
        # The adapter names parameters of the policy, which is a submodule of the actor-critic.
        factors = {f"policy.{name}": factor for name, factor in hooks.rate_factors.items()}
        if settings.ppo.value_learning_rate is not None:
            factor = settings.ppo.value_learning_rate / settings.train.learning_rate
            # Factors relative to train.learning_rate: one optimizer and one schedule for both models.
            names = [name for name, weight in self.cast.roles.named_parameters() if weight.requires_grad]
            factors |= {name: factor for name in names if name.startswith("value.")}
        return replace(hooks, rate_factors=factors)

    @cached_property
    def pretraining(self) -> Pretraining | None:
        """Return the tokenized rows of PPO-ptx, or None.

        Raises:
            UserError: the rows cannot be read.
        """
        settings, encoder = self.settings, self.text.encoder
        wanted = settings.pretraining
        if wanted.source is None:
            return None
        report, most = DataReport(), self.text.max_length
        place = Place("pretraining.source", wanted.source, "train", None, None)
        rows = read_conversations(place, report, seed=settings.train.seed)
        told = report, DataReport()
        data = prepare_gathered(rows, [], DataSettings(), encoder, max_length=most, told=told)
        self.job.say(f"pretraining: {'; '.join(report.lines())}")
        pad = PaddedCollator(encoder.stop_ids[0])
        return Pretraining(data.train, pad, wanted.batch_size, wanted.weight, settings.train.seed)

    def facts(self) -> dict[str, Any]:
        """Return the metadata that run.json records before the first step, after all checks."""
        self.arguments()
        self._refuse_passes()
        self.job.watch(self.behaviour.numbers)
        self._say_roles()
        self.job.check(
            Tick("environment", self.job.environment(self.policy.precision)),
            try_rewards(self.cast.rewards, self.data),
        )
        self.job.choose("train.max_steps", (self.steps, "optimizer steps of all rollouts"))
        assert self.pretraining is None or len(self.pretraining.rows)
        facts = tuning.policy_facts(self.job, self.text, self.policy, self.data.report)
        return {**facts, "rewards": rewards_record(self.settings.reward)}

    def arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: transformers rejects them.
        """
        longest = max(self.data.train.lengths) + self.settings.sampling.max_new_tokens
        arguments = tuning.engine_arguments(self.job, self.policy, longest=longest, steps=self.steps)
        # PPO counts its own steps: epochs of the Trainer would count prompts.
        arguments.max_steps = self.steps
        return arguments

    def trainer(self) -> Trainer:
        """Return the trainer; the reference is the policy as it is now."""
        settings, args, ppo = self.settings, self.arguments(), self.settings.ppo
        # A checkpoint replaces these values when training resumes.
        progress = Progress(FixedKl(ppo.kl_coefficient))
        if ppo.kl_target is not None:
            progress.controller = AdaptiveKl(ppo.kl_coefficient, ppo.kl_target, ppo.kl_horizon)
        trainer = PpoTrainer(
            self.cast.roles,
            args,
            train_rows=self.data.train,
            held_out_rows=self.data.held_out,
            collator=list,  # rows are prompts; batches are built from the rollout
            batch_size=settings.train.batch_size,
            group_by_length=settings.train.group_by_length,
            hooks=self.hooks,
        )
        trainer.ppo, trainer.progress, trainer.pretraining = ppo, progress, self.pretraining
        trainer.collector = self._collector(args.per_device_train_batch_size)
        if self.data.held_out is not None:
            rows = self.data.held_out
            trainer.held_out = [rows[i] for i in spread(len(rows), settings.evaluate.judge_rows)]
        trainer.gold, trainer.begins_at_one = self._gold, self._at_one
        trainer.add_callback(KeepProgress(progress))
        trainer.add_callback(
            StopWhenSpoilt(
                settings.stop, first=lambda: progress.first, history=self._history, tell=self._tell_stop
            )
        )
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Generate greedily with the current policy."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record held-out metrics, and after training the first and last training metrics."""
        assert isinstance(trainer, PpoTrainer)
        run = self.job.run
        # A resumed run does not repeat an evaluation that is recorded.
        if trainer.held_out and f"{HELD_OUT}reward_{when}" not in run.record.get("metrics", {}):
            with self.job.timed("held_out"):
                found = trainer.measure()
            run.update(metrics={f"{HELD_OUT}{name}_{when}": value for name, value in found.items()})
        if when == "after":
            tuning.record_training(self.job, trainer, AT_BOTH_ENDS)

    def save(self) -> None:
        """Save the policy's adapter (or the model), reload it to verify, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def explain(self) -> None:
        """Log and record the diagnostics of the run."""
        run = self.job.run
        pairs = [(line["before"], line["after"]) for line in run.samples()]
        found = panel.findings(run.record["metrics"], pairs)
        for finding in found:
            self.job.say(finding.line())
        run.update(panel=[finding.record() for finding in found])

    def _collector(self, size: int) -> Collector:
        sampling, encoder = self.settings.sampling, self.text.encoder
        return Collector(
            self.cast.roles,
            StartingPolicy(self.policy.model),
            self.cast.rewards,
            encoder,
            Sampling.on(self.job.hardware.device, sampling, stop_ids=encoder.stop_ids),
            self.policy.precision,
            size,
        )

    def _gold(self, replies: Replies) -> dict[str, float]:
        """Return the mean of each grader (gold reward), which the run does not maximize."""
        judges = self.behaviour.judges
        questions = [question_of([*prompt.talk, Message("assistant", "")]) for prompt in replies.prompts]
        return {
            f"{GOLD}{name}": mean_judgement(name, judge, questions, replies.texts)
            for name, judge in judges.items()
        }

    def _history(self) -> list[Numbers]:
        """Return all held-out metrics so far, from before training on, as read by rank 0."""
        # Only rank 0 has the metrics file, and all ranks must agree on whether to stop.
        return processes.from_main(self._written() if self.job.world.main else [])

    def _written(self) -> list[Numbers]:
        run = self.job.run
        known = run.record["metrics"]
        start = {name.removesuffix("_before"): value for name, value in known.items() if "_before" in name}
        lines = [start, *(line for line in run.metrics() if f"{HELD_OUT}reward" in line)]
        return [{name.removeprefix(HELD_OUT): value for name, value in line.items()} for line in lines]

    def _at_one(self, error: float) -> None:
        """Check once that the first update's ratios to the sampling policy are 1."""
        if any(tick["name"] == RATIO for tick in self.job.preflight):
            return
        allowed = AT_ONE[self.policy.precision]
        if error > allowed:
            found = f"ratios of the first update differ from 1 by up to {error:.2g}"
            problem = Problem("model", found, f"at most {allowed:g}: the policy has not changed yet")
            self.job.check(failed(RATIO, problem))
        said = "exactly 1" if error == 0 else f"1 within {error:.1g}"
        self.job.check(Tick(RATIO, f"ratio to the sampling policy is {said} on the first update"))

    def _say_roles(self) -> None:
        """Log the trainable parameters of policy and value, and how the value is initialized."""
        counted = count_parameters(self.cast.roles)
        own = count_parameters(self.policy.model).trained
        found = value_run(self.settings)
        begins = "the initial policy with a zero head" if found is None else f"{found[0]}"
        self.job.say(
            f"trainable parameters: policy {own:,}, value {counted.trained - own:,} "
            f"(initialized from {begins}); {counted.total:,} in total with the shared base"
        )
        if self.cast.roles.had_dropout:
            self.job.say("dropout is off: the ratio to the sampling policy must start at 1")

    def _refuse_passes(self) -> None:
        if self.hooks.passes != 1:
            found = "true: consistency between two forward passes is a loss on labels"
            expected = "false in RL"
            raise UserError(Problem("adapter.consistency", found, expected, "adapter.consistency=false"))

    def _tell_stop(self, reason: str) -> None:
        self.job.say(reason)
        self.job.run.update(stopped=reason)


RATIO = "ratio"
