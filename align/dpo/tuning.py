"""DPO method: builds reference, trainer, pre-flight checks and metrics from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from transformers import Trainer, TrainingArguments

from align.dpo import panel, preflight
from align.dpo.collate import PreferenceCollator, PreferenceRows, length_ratio
from align.dpo.objective import Objective
from align.dpo.reference import rows_of_steps
from align.dpo.references import Reference
from align.dpo.settings import AlignSettings
from align.dpo.stop_rule import MEASURED, StopWhenChosenFalls
from align.dpo.trainer import HELD_OUT, PreferenceTrainer
from align.dpo.trl_engine import start_tick, trl_dpo_trainer
from align.dpo.trl_losses import trl_loss
from align.preference.attention import cost_of, unwrapped, why_separate
from align.preference.losses.catalogue import Loss, find_loss
from align.preference.rows.completion_rows import as_rows
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from align.preference.starting_policy import StartingPolicy
from align.preference.trl_engine import refuse_lists
from data_templates._segments import Message
from finetune.adapters._traits import Hooks
from finetune.recipe.errors import Problem, UserError
from finetune.training import tuning
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.arguments import SUPERVISED, TrlStage
from finetune.training.behaviour import Behaviour
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.preflight.ticks import Tick
from finetune.training.preflight.whole import row_ticks, vocabulary_tick
from finetune.training.samples import Samples
from finetune.training.stops import NotFiniteError
from finetune.training.text import Text

AT_BOTH_ENDS = ("loss", "accuracy", "margin", "chosen_drift", "rejected_drift", "kl")
"""Metrics recorded from the first training step and the last ones."""


@dataclass(frozen=True)
class PreferenceTuning:
    """DPO and its variants: trains a policy on preference pairs and ranked lists."""

    job: Job
    text: Text
    data: PreparedPreferences
    policy: Policy
    align: AlignSettings

    @property
    def steps(self) -> int:
        return tuning.optimizer_steps(self.job, len(self.data.train))

    @property
    def samples(self) -> Samples:
        """Return the sample prompts; the expected reply is the best completion."""
        return tuning.samples_of(self.job, self.text, self.data.prompts)

    @cached_property
    def behaviour(self) -> Behaviour:
        return tuning.behaviour_of(self.job, self.text, self.data.prompts)

    @property
    def loss(self) -> Loss:
        return find_loss(self.align.loss_name, where="align.loss")

    @cached_property
    def hooks(self) -> Hooks:
        return adapter_hooks(self.policy.model, self.job.recipe.settings.adapter, steps=self.steps)

    @cached_property
    def objective(self) -> Objective:
        return Objective.of(self.loss, self.loss.settings(self.align.loss_settings, where="align.loss"))

    @cached_property
    def collator(self) -> PreferenceCollator:
        """Return the collator: shared prompts if this model can take a block mask; logs the decision."""
        pad, groups = self.text.encoder.stop_ids[0], self.data.train
        # TRL's own collator has one completion per row.
        if self.by_trl:
            return PreferenceCollator(pad, separate=True)
        stored = {"precision": self.policy.precision, "stored": self.policy.quantization}
        # Virtual tokens take positions too, which count against an attention window.
        why = why_separate(
            unwrapped(self.policy.model).config, reach=groups.longest + self.text.virtual_tokens
        )
        if why:
            self.job.check(Tick("layout", f"prompt sharing off: {why}"))
            return PreferenceCollator(pad, separate=True)
        tick = preflight.layout_tick(self.policy.model, groups, pad_id=pad, **stored)
        self.job.check(tick)
        return PreferenceCollator(pad, separate=tick.warned, cost=cost_of(self.policy.model))

    @property
    def by_trl(self) -> bool:
        return self.job.recipe.settings.train.engine == "trl"

    def facts(self) -> dict[str, Any]:
        """Run the pre-flight checks and return the metadata of run.json; raises whatever can be refused."""
        self.job.watch(self.behaviour.numbers)
        tuning.say_parameters(self.job, self.policy)
        self.preflight()
        # Built here too, so that invalid arguments are refused before step 0.
        self.arguments()
        return tuning.policy_facts(self.job, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Check rows, model, layout and gradients before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        job, text, data, policy = self.job, self.text, self.data, self.policy
        self._refuse_passes()
        if self.by_trl:
            refuse_lists(data.train, where="data.source")
            if data.held_out is not None:
                refuse_lists(data.held_out, where="data.held_out")
        with job.timed("preflight"):
            job.check(Tick("environment", job.environment(policy.precision)))
            rows = as_rows(data.train)
            job.check(
                *row_ticks(rows, data.report, text.encoder, max_length=text.max_length, blocks=False),
                vocabulary_tick(policy.model, rows, text.encoder),
            )
            stored = {"precision": policy.precision, "stored": policy.quantization}
            job.check(
                *preflight.gradient_ticks(
                    policy.model, data.train, self.collator, objective=self.objective, **stored
                )
            )

    def arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: the engine refuses them.
        """
        # The micro-batch size is resolved for the longest row of the layout: a group, or one per completion.
        longest = int(self.data.train.lengths.max())
        if self.collator.separate:
            longest = self.data.train.longest * int(self.data.train.completions.max())
        stage = SUPERVISED
        if self.by_trl:
            settings = self.loss.settings(self.align.loss_settings, where="align.loss")
            stage = TrlStage(self.job.recipe.settings.TRL_CONFIG, trl_loss(self.loss.name, settings))
        return tuning.engine_arguments(self.job, self.policy, longest=longest, steps=self.steps, stage=stage)

    def trainer(self) -> Trainer:
        """Return the engine's trainer, with the reference computed and checked against the initial policy.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        trainer = self._trl_trainer() if self.by_trl else self._native_trainer()
        if self.align.stop_when_chosen_falls is not None:
            # The value before training is recorded after the trainer is built, hence a callable.
            most, run = self.align.stop_when_chosen_falls, self.job.run
            trainer.add_callback(
                StopWhenChosenFalls(
                    most, start=lambda: run.record["metrics"][f"{MEASURED}_before"], tell=self._tell_stop
                )
            )
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Generate greedy completions with the current policy."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record the held-out metrics before or after training, and training's first and last metrics.

        Raises:
            NotFiniteError: the held-out loss is NaN or infinite.
        """
        run = self.job.run
        # A resumed run has its `before` metrics already.
        known = run.record.get("metrics", {})
        if self.data.held_out is not None and f"{HELD_OUT}loss_{when}" not in known:
            with self.job.timed("held_out"):
                found = trainer.measure(trainer.eval_dataset)
            if not isfinite(found["loss"]):
                raise NotFiniteError(f"held-out loss is {found['loss']} {when} training")
            run.update(metrics={f"{HELD_OUT}{name}_{when}": value for name, value in found.items()})
        if when == "after":
            tuning.record_training(self.job, trainer, AT_BOTH_ENDS)

    def save(self) -> None:
        """Save the adapter (or the model), reload it, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def explain(self) -> None:
        """Log and record the diagnostics of the run."""
        run = self.job.run
        pairs = [(line["before"], line["after"]) for line in run.samples()]
        seen = panel.Seen(
            metrics=run.record["metrics"],
            length_ratio=length_ratio(self.data.train),
            replies=pairs,
            likelihood=self.loss.needs.nll,
        )
        found = panel.findings(seen)
        for finding in found:
            self.job.say(finding.line())
        run.update(panel=[finding.record() for finding in found])

    def _refuse_passes(self) -> None:
        """Raise if the adapter needs two forward passes per batch (AdaMix consistency)."""
        if self.hooks.passes != 1:
            found = "true: the consistency loss over two forward passes is a loss on labels"
            expected = "false with preference losses"
            raise UserError(Problem("adapter.consistency", found, expected, "adapter.consistency=false"))

    def _native_trainer(self) -> PreferenceTrainer:
        train, args = self.job.recipe.settings.train, self.arguments()
        live = self.objective.needs_reference and self.align.reference == "live"
        # Copied before a checkpoint is loaded: in a resumed run too, the reference is the initial policy.
        start = StartingPolicy(self.policy.model) if live else None
        used, held_out = self._used(), self.data.held_out
        size = args.per_device_train_batch_size
        trainer = PreferenceTrainer(
            self.policy.model,
            args,
            train_rows=self._rows(self.data.train, used, size),
            held_out_rows=None if held_out is None else self._rows(held_out, range(len(held_out)), size),
            collator=self.collator,
            batch_size=train.batch_size,
            group_by_length=train.group_by_length,
            hooks=self.hooks,
        )
        # Set before the check below, which runs the forward pass of training.
        trainer.objective, trainer.start, trainer.precision = self.objective, start, self.policy.precision
        if self.objective.needs_reference:
            proved = preflight.some_rows(used)
            self.job.check(preflight.start_tick(trainer, proved, stored=self.policy.quantization))
        return trainer

    def _trl_trainer(self) -> Trainer:
        with self.job.timed("reference"):
            trainer = trl_dpo_trainer(
                self.policy.model,
                self.arguments(),
                self.text.encoder.tokenizer,
                train=self.data.train,
                held_out=self.data.held_out,
                loss=self.objective.loss,
            )
        self.job.say(
            f"reference log-probabilities of {len(self.data.train)} pairs: "
            f"{self.job.seconds['reference']:.1f} s"
        )
        self.job.check(start_tick(trainer, self.policy.precision))
        return trainer

    def _used(self) -> list[int]:
        """Return the groups that the run's steps use."""
        train = self.job.recipe.settings.train
        return rows_of_steps(
            self.data.train.lengths.tolist(),
            steps=self.steps,
            batch_size=train.batch_size,
            seed=train.seed,
            group_by_length=train.group_by_length,
        )

    def _rows(self, groups: PreferenceGroups, rows: Sequence[int], size: int) -> PreferenceRows:
        """Return groups with precomputed reference log-probabilities, if the loss needs them."""
        if not self.objective.needs_reference or self.align.reference == "live":
            return PreferenceRows(groups)
        return PreferenceRows(groups, Reference(self.job, self.policy, self.collator, size).of(groups, rows))

    def _tell_stop(self, why: str) -> None:
        self.job.say(why)
        self.job.run.update(stopped=why)
