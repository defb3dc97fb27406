"""SFT and continued pretraining: trainer, pre-flight, held-out loss and perplexity, from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, isfinite
from typing import Any

from transformers import Trainer, TrainingArguments

from data_templates._segments import Message
from finetune.data.collate import Collator, PackedCollator, PaddedCollator
from finetune.data.dataset import Prepared, TokenizedRows
from finetune.training import tuning
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.behaviour import Behaviour
from finetune.training.completion import held_out_loss
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.preflight.ticks import Tick
from finetune.training.preflight.whole import model_ticks, row_ticks, vocabulary_tick
from finetune.training.samples import Samples
from finetune.training.stops import NotFiniteError
from finetune.training.text import Text
from finetune.training.trainer import NativeTrainer
from finetune.training.trl_engine import trl_trainer

LARGEST_LOSS = 700.0
"""exp() of a larger loss overflows a float."""


@dataclass(frozen=True)
class Supervised:
    """Supervised fine-tuning of a policy on tokenized rows."""

    job: Job
    text: Text
    data: Prepared
    policy: Policy

    @property
    def steps(self) -> int:
        return tuning.optimizer_steps(self.job, len(self.data.train))

    @property
    def samples(self) -> Samples:
        """Return the prompts of samples.jsonl."""
        return tuning.samples_of(self.job, self.text, self.data.prompts)

    @cached_property
    def behaviour(self) -> Behaviour:
        """Return the evaluation of generated completions, before and after training."""
        return tuning.behaviour_of(self.job, self.text, self.data.prompts)

    def facts(self) -> dict[str, Any]:
        """Run the pre-flight and return run.json's initial sections; every refusal happens here."""
        self.arguments()  # raises for engine arguments that the engine refuses
        self.job.watch(self.behaviour.numbers)
        tuning.say_parameters(self.job, self.policy)
        self.preflight()
        return tuning.policy_facts(self.job, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Check the run's rows and model before step 0, without changing either.

        Raises:
            UserError: a check failed.
        """
        job, text, data, policy = self.job, self.text, self.data, self.policy
        with job.timed("preflight"):
            job.check(Tick("environment", job.environment(policy.precision)))
            blocks = job.recipe.settings.data.texts is not None
            job.check(
                *row_ticks(data.train, data.report, text.encoder, max_length=text.max_length, blocks=blocks),
                vocabulary_tick(policy.model, data.train, text.encoder),
            )
            stored = {"precision": policy.precision, "quantization": policy.quantization}
            job.check(*model_ticks(policy.model, data.train, self._as_trained(), **stored))

    def arguments(self) -> TrainingArguments:
        """Return the engine's training arguments, with ``auto`` values resolved.

        Raises:
            UserError: the engine refuses them.
        """
        longest = self.data.report.longest
        return tuning.engine_arguments(self.job, self.policy, longest=longest, steps=self.steps)

    def trainer(self) -> Trainer:
        """Build the engine's trainer, which creates the checkpoint folder."""
        train = self.job.recipe.settings.train
        rows, held_out = self.data.train, self.data.held_out
        if train.engine == "trl":
            tokenizer = self.text.encoder.tokenizer
            args = self.arguments()
            return trl_trainer(self.policy.model, args, tokenizer, train_rows=rows, held_out_rows=held_out)
        trainer = NativeTrainer(
            self.policy.model,
            self.arguments(),
            train_rows=rows,
            held_out_rows=held_out,
            collator=self._collator(),
            batch_size=train.batch_size,
            group_by_length=train.group_by_length,
            hooks=adapter_hooks(self.policy.model, self.job.recipe.settings.adapter, steps=self.steps),
        )
        trainer.label_smoothing, trainer.neftune_alpha = train.label_smoothing, train.neftune_alpha
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Generate completions greedily with the current policy."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record the held-out loss before or after training; after it, the training loss too.

        For plain documents also their perplexity per token, exp(loss).

        Raises:
            NotFiniteError: the held-out loss is NaN or infinite.
        """
        run = self.job.run
        # A resumed run keeps the metrics of the untrained model that its first start recorded.
        if self.data.held_out is not None and f"held_out_loss_{when}" not in run.record.get("metrics", {}):
            with self.job.timed("held_out"):
                loss = self._held_out_loss(trainer, self.data.held_out)
            if not isfinite(loss):
                raise NotFiniteError(f"held-out loss is {loss} {when} training")
            run.update(metrics={f"held_out_loss_{when}": loss})
            if self.job.recipe.settings.data.texts is not None:
                run.update(metrics={f"held_out_perplexity_{when}": exp(min(loss, LARGEST_LOSS))})
        if when == "after":
            tuning.record_training(self.job, trainer)

    def save(self) -> None:
        """Save the adapter (or the model), reload it to verify it, and record its checksums.

        Raises:
            UserError: the saved weights differ from the trained ones.
        """
        tuning.save_policy(self.job, self.text, self.policy)

    def _held_out_loss(self, trainer: Trainer, rows: TokenizedRows) -> float:
        return held_out_loss(
            trainer.model, rows, self._collator(), lines=trainer.args.per_device_train_batch_size
        )

    def _as_trained(self) -> Collator:
        """Return a collator with training's layout for the pre-flight: TRL's ``padding_free`` packs too."""
        train = self.job.recipe.settings.train
        if train.engine == "trl" and train.engine_args.get("padding_free"):
            return PackedCollator(self.text.encoder.stop_ids[0], single_line=True)
        return self._collator()

    def _collator(self) -> Collator:
        pad = self.text.encoder.stop_ids[0]
        if not self.job.recipe.settings.data.packing:
            return PaddedCollator(pad)
        asked = self.job.recipe.settings.model.attention
        return PackedCollator(pad, single_line=asked == "flash_attention_2")
