"""The pieces of preference tuning, put together from a recipe: reference, trainer, checks, measures."""

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
"""What is recorded of training's first step and of its last ones."""


@dataclass(frozen=True)
class PreferenceTuning:
    """Tuning of a policy on comparisons."""

    job: Job
    text: Text
    data: PreparedPreferences
    policy: Policy
    align: AlignSettings

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return tuning.optimizer_steps(self.job, len(self.data.train))

    @property
    def samples(self) -> Samples:
        """Return the prompts to answer before and after training; the best completion is what is expected."""
        return tuning.samples_of(self.job, self.text, self.data.prompts)

    @cached_property
    def behaviour(self) -> Behaviour:
        """Return what is measured of the replies, before and after training."""
        return tuning.behaviour_of(self.job, self.text, self.data.prompts)

    @property
    def loss(self) -> Loss:
        """Return the loss of the catalogue that the recipe names."""
        return find_loss(self.align.loss_name, where="align.loss")

    @cached_property
    def hooks(self) -> Hooks:
        """Return what the adapter does while it trains."""
        return adapter_hooks(self.policy.model, self.job.recipe.settings.adapter, steps=self.steps)

    @cached_property
    def objective(self) -> Objective:
        """Return what is minimised."""
        return Objective.of(self.loss, self.loss.settings(self.align.loss_settings, where="align.loss"))

    @cached_property
    def collator(self) -> PreferenceCollator:
        """Return how groups are laid out: prompts shared, where this model can; it is told which and why."""
        pad, groups = self.text.encoder.stop_ids[0], self.data.train
        if self.by_trl:
            return PreferenceCollator(pad, separate=True)
        stored = {"precision": self.policy.precision, "stored": self.policy.quantization}
        why = why_separate(
            unwrapped(self.policy.model).config, reach=groups.longest + self.text.virtual_tokens
        )
        if why:
            self.job.check(Tick("layout", f"each completion behind its prompt in a line of its own: {why}"))
            return PreferenceCollator(pad, separate=True)
        tick = preflight.layout_tick(self.policy.model, groups, pad_id=pad, **stored)
        self.job.check(tick)
        return PreferenceCollator(pad, separate=tick.warned, cost=cost_of(self.policy.model))

    @property
    def by_trl(self) -> bool:
        """Tell whether TRL's trainer runs it."""
        return self.job.recipe.settings.train.engine == "trl"

    def facts(self) -> dict[str, Any]:
        """Return what run.json says before the first step; whatever can be refused is refused here."""
        self.job.watch(self.behaviour.numbers)
        tuning.say_parameters(self.job, self.policy)
        self.preflight()
        self.arguments()
        return tuning.policy_facts(self.job, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Prove before step 0 what can be proved on the run's own rows and model; neither is changed.

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
        """Return the engine's arguments; whatever is ``auto`` is decided here.

        Raises:
            UserError: the engine refuses them.
        """
        longest = int(self.data.train.lengths.max())
        if self.collator.separate:
            longest = self.data.train.longest * int(self.data.train.completions.max())
        stage = SUPERVISED
        if self.by_trl:
            settings = self.loss.settings(self.align.loss_settings, where="align.loss")
            stage = TrlStage(self.job.recipe.settings.TRL_CONFIG, trl_loss(self.loss.name, settings))
        return tuning.engine_arguments(self.job, self.policy, longest=longest, steps=self.steps, stage=stage)

    def trainer(self) -> Trainer:
        """Return the engine's trainer, the reference computed and compared with the policy's start.

        Raises:
            UserError: policy and reference differ.
        """
        trainer = self._trl_trainer() if self.by_trl else self._native_trainer()
        if self.align.stop_when_chosen_falls is not None:
            most, run = self.align.stop_when_chosen_falls, self.job.run
            trainer.add_callback(
                StopWhenChosenFalls(
                    most, start=lambda: run.record["metrics"][f"{MEASURED}_before"], tell=self._tell_stop
                )
            )
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Answer prompts greedily with the policy as it is."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record the held-out measures before or after training, and those of training at both ends.

        Raises:
            NotFiniteError: the held-out loss is NaN or infinite.
        """
        run = self.job.run
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
        """Save the adapter (or the model), open it again, and put its checksum into the record.

        Raises:
            UserError: what was saved is not what was trained.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def explain(self) -> None:
        """Say what happened to the policy, what it means, and what to do about it."""
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
        """Refuse an adapter that wants each batch twice: its second term is one of labels, not of pairs."""
        if self.hooks.passes != 1:
            found = "true: predictions of two passes are pulled together, which is a loss on labels"
            expected = "false where completions are compared"
            raise UserError(Problem("adapter.consistency", found, expected, "adapter.consistency=false"))

    def _native_trainer(self) -> PreferenceTrainer:
        train, args = self.job.recipe.settings.train, self.arguments()
        live = self.objective.needs_reference and self.align.reference == "live"
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
        self.job.say(f"reference of {len(self.data.train)} pairs: {self.job.seconds['reference']:.1f} s")
        self.job.check(start_tick(trainer, self.policy.precision))
        return trainer

    def _used(self) -> list[int]:
        """Return the groups that the run's steps look at."""
        train = self.job.recipe.settings.train
        return rows_of_steps(
            self.data.train.lengths.tolist(),
            steps=self.steps,
            batch_size=train.batch_size,
            seed=train.seed,
            group_by_length=train.group_by_length,
        )

    def _rows(self, groups: PreferenceGroups, rows: Sequence[int], size: int) -> PreferenceRows:
        """Return groups with the reference's log-probabilities, if the loss needs them before step 0."""
        if not self.objective.needs_reference or self.align.reference == "live":
            return PreferenceRows(groups)
        return PreferenceRows(groups, Reference(self.job, self.policy, self.collator, size).of(groups, rows))

    def _tell_stop(self, why: str) -> None:
        self.job.say(why)
        self.job.run.update(stopped=why)
