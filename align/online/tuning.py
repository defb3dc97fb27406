"""The pieces of RLOO and GRPO, put together from a recipe: trainer, checks, measures."""

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
"""Prompts, and tokens of replies to them, on which reference and policy are compared."""
START = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""How far reference and policy may be apart at the start, nats a token, from rounding alone."""


@dataclass(frozen=True)
class OnlineTuning:
    """Tuning of a policy on rewards of groups of its own replies."""

    job: Job
    text: Text
    data: PreparedPrompts
    judged: Judged
    align: RlooSettings | GrpoSettings

    @property
    def settings(self) -> OnlineSettings:
        """Return the recipe's sections."""
        settings = self.job.recipe.settings
        assert isinstance(settings, OnlineSettings)
        return settings

    @property
    def policy(self) -> Policy:
        """Return what is trained."""
        return self.judged.policy

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return tuning.optimizer_steps(self.job, len(self.data.train) * self.settings.sampling.samples)

    @property
    def samples(self) -> Samples:
        """Return the prompts to answer before and after training."""
        return tuning.samples_of(self.job, self.text, self.data.conversations)

    @cached_property
    def behaviour(self) -> Behaviour:
        """Return what is measured of greedy replies before and after training."""
        return tuning.behaviour_of(self.job, self.text, self.data.conversations)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """Return what is measured of sampled replies to held-out prompts, if there are any."""
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
        """Return the policy as it starts; it is asked for before a checkpoint is loaded."""
        return StartingPolicy(self.policy.model)

    def facts(self) -> dict[str, Any]:
        """Return what run.json says before the first step; whatever can be refused is refused here."""
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
        """Return the engine's arguments; whatever is ``auto`` is decided here.

        Raises:
            UserError: the engine refuses them.
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
        arguments.max_steps = self.steps
        return arguments

    def trainer(self) -> OnlineTrainer:
        """Return TRL's trainer; its reference is compared with the policy's start.

        Raises:
            UserError: they differ.
        """
        train, prompts = self.settings.train, self.data.train
        together = train.batch_size // self.settings.sampling.samples
        assert self.start.copies, "the start is kept before anything is learnt or loaded"
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
        if self.align.beta:
            self._check_start()
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Answer prompts greedily with the policy as it is."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record the measures of sampled replies before or after training, and training's at both ends.

        Raises:
            NotFiniteError: a measure is NaN or infinite.
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
        """Save the adapter (or the model), open it again, and put its checksum into the record.

        Raises:
            UserError: what was saved is not what was trained.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def _check_start(self) -> None:
        """Check that TRL's reference is the policy as it starts, adapter and all."""
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
            found = f"with adapter.method '{method}' its log-probabilities are up to {apart:.2g} nats apart"
            expected = "a reference that is the policy as it starts"
            problem = Problem("align.beta", found, expected, "align.beta=0, or adapter.method=lora")
            self.job.check(failed("start", problem))
        at = "exactly" if not apart else f"to {apart:.1g} nats a token"
        self.job.check(Tick("start", f"the policy begins as the reference, {at}"))

    def _sampling(self) -> Sampling:
        stops = self.text.encoder.stop_ids
        return Sampling.on(self.job.hardware.device, self.settings.sampling, stop_ids=stops)

    def _measured(self) -> dict[str, float]:
        assert self.held_out is not None
        return {f"{HELD_OUT}{name}": value for name, value in self.held_out.measure().items()}
