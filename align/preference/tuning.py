"""The pieces of preference tuning, put together from a recipe: reference, trainer, checks, measures."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainingArguments

from align.preference import preflight
from align.preference.attention import unwrapped, why_separate
from align.preference.collate import PreferenceCollator, PreferenceRows
from align.preference.dataset import PreferenceGroups, PreparedPreferences
from align.preference.losses import find_loss
from align.preference.objective import Objective
from align.preference.prepare import prepare_preferences
from align.preference.reference import (
    Logps,
    keep_reference,
    kept_reference,
    reference_file,
    reference_logps,
    rows_of_steps,
)
from align.preference.scoring import StartingPolicy, arithmetic
from align.preference.settings import AlignSettings, PreferenceSettings
from align.preference.trainer import HELD_OUT, PreferenceTrainer
from data_templates._segments import Message
from finetune.data.cache import DamagedCacheError
from finetune.recipe.errors import Problem, UserError
from finetune.training import tuning
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.behaviour import Behaviour
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.preflight.ticks import Tick
from finetune.training.preflight.whole import row_ticks, vocabulary_tick
from finetune.training.samples import Samples
from finetune.training.stops import NotFiniteError
from finetune.training.text import Text


def load_preferences(job: Job, settings: PreferenceSettings, text: Text) -> PreparedPreferences:
    """Read and tokenise a recipe's preferences, and tell what was found.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = job.recipe.settings.train.seed
    with job.timed("data"):
        data = prepare_preferences(settings, text.encoder, max_length=text.max_length, seed=seed)
    for line in data.report.lines():
        job.say(line)
    return data


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

    @cached_property
    def objective(self) -> Objective:
        """Return what is minimised."""
        loss = find_loss(self.align.loss_name, where="align.loss")
        return Objective.of(loss, loss.settings(self.align.loss_settings, where="align.loss"))

    @cached_property
    def collator(self) -> PreferenceCollator:
        """Return how groups are laid out: prompts shared, where this model can; it is told which and why."""
        pad, groups = self.text.encoder.stop_ids[0], self.data.train
        stored = {"precision": self.policy.precision, "stored": self.policy.quantization}
        why = why_separate(
            unwrapped(self.policy.model).config, reach=groups.longest + self.text.virtual_tokens
        )
        if why:
            self.job.check(Tick("layout", f"each completion behind its prompt in a line of its own: {why}"))
            return PreferenceCollator(pad, separate=True)
        tick = preflight.layout_tick(self.policy.model, groups, pad_id=pad, **stored)
        self.job.check(tick)
        return PreferenceCollator(pad, separate=tick.warned)

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
        with job.timed("preflight"):
            job.check(Tick("environment", job.environment(policy.precision)))
            rows = preflight.as_rows(data.train)
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
        return tuning.engine_arguments(self.job, self.policy, longest=longest, steps=self.steps)

    def trainer(self) -> Trainer:
        """Return the engine's trainer, the reference computed and compared with the policy's start.

        Raises:
            UserError: policy and reference differ.
        """
        assert self.job.recipe.settings.train.engine == "native", "the recipe's checks refuse the other one"
        return self._native_trainer()

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
            tuning.record_training(self.job, trainer, ("loss", "accuracy", "margin"))

    def save(self) -> None:
        """Save the adapter (or the model), open it again, and put its checksum into the record.

        Raises:
            UserError: what was saved is not what was trained.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def _refuse_passes(self) -> None:
        """Refuse an adapter that wants each batch twice: its second term is one of labels, not of pairs."""
        hooks = adapter_hooks(self.policy.model, self.job.recipe.settings.adapter, steps=self.steps)
        if hooks.passes != 1:
            found = "true: predictions of two passes are pulled together, which is a loss on labels"
            expected = "false where completions are compared"
            raise UserError(Problem("adapter.consistency", found, expected, "adapter.consistency=false"))

    def _native_trainer(self) -> PreferenceTrainer:
        train, args = self.job.recipe.settings.train, self.arguments()
        live = self.objective.needs_reference and self.align.reference == "live"
        start = StartingPolicy(self.policy.model) if live else None
        used = self._used(args)
        rows = self._rows(self.data.train, used, args)
        everything = range(len(self.data.held_out or ()))
        held_out = self._rows(self.data.held_out, everything, args) if self.data.held_out else None
        trainer = PreferenceTrainer(
            self.policy.model,
            args,
            train_rows=rows,
            held_out_rows=held_out,
            collator=self.collator,
            batch_size=train.batch_size,
            group_by_length=train.group_by_length,
            hooks=adapter_hooks(self.policy.model, self.job.recipe.settings.adapter, steps=self.steps),
        )
        trainer.objective, trainer.start, trainer.precision = self.objective, start, self.policy.precision
        if self.objective.needs_reference:
            proved = preflight.some_rows(used)
            self.job.check(preflight.start_tick(trainer, proved, stored=self.policy.quantization))
        return trainer

    def _used(self, args: TrainingArguments) -> list[int]:
        """Return the groups that the run's steps look at; where processes share them out, all."""
        train, lengths = self.job.recipe.settings.train, self.data.train.lengths.tolist()
        if args.world_size > 1:
            return list(range(len(lengths)))
        return rows_of_steps(
            lengths,
            steps=self.steps,
            batch_size=train.batch_size,
            seed=train.seed,
            group_by_length=train.group_by_length,
        )

    def _rows(self, groups: PreferenceGroups, used: Sequence[int], args: TrainingArguments) -> PreferenceRows:
        """Return groups with the reference's log-probabilities, if the loss needs them before step 0."""
        if not self.objective.needs_reference or self.align.reference == "live":
            return PreferenceRows(groups)
        with self.job.timed("reference"):
            return PreferenceRows(groups, self._reference(groups, used, args))

    def _reference(self, groups: PreferenceGroups, used: Sequence[int], args: TrainingArguments) -> Logps:
        """Return the reference from the cache of an earlier run, or compute and keep it."""
        cache = self.job.recipe.settings.data.cache
        file = reference_file(self.policy.model, self._key(used), groups)
        try:
            found = kept_reference(file) if cache else None
        except DamagedCacheError as damage:
            self.job.say(f"damaged reference, it is computed again: {damage}")
            found = None
        if found is not None:
            self.job.say(f"reference of {len(used)} groups from the cache")
            return found
        started = time.monotonic()
        with self._progress(len(used)) as done, arithmetic(self.policy.model, self.policy.precision):
            size = args.per_device_train_batch_size
            found = reference_logps(
                self.policy.model, groups, used, collate=self.collator, size=size, done=done
            )
        seconds = time.monotonic() - started
        self.job.say(f"reference of {len(used)} groups: {seconds:.1f} s, {len(used) / seconds:.1f} groups/s")
        if cache:
            keep_reference(file, found)
        return found

    def _key(self, used: Sequence[int]) -> dict[str, Any]:
        """Return what the reference's numbers depend on, beside weights and tokens."""
        return {
            "rows": list(used),
            "precision": self.policy.precision,
            "quantization": self.policy.quantization,
            "separate": self.collator.separate,
            "attention": unwrapped(self.policy.model).config._attn_implementation,
            "device": self.job.hardware.device,
            "versions": [torch.__version__, transformers.__version__],
        }

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show how far the reference is; a signal stops it between two passes."""
        columns = (TextColumn("  reference"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = self.job.console
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=total)

            def done(groups: int) -> None:
                bar.advance(task, groups)
                self.job.stop_if_asked("while the reference was computed")

            yield done
