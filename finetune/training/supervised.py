"""SFT and continued pretraining: trainer, pre-flight, held-out loss and perplexity, from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, isfinite
from typing import Any

from transformers import Trainer, TrainingArguments

from data_templates.segments import Message
from finetune.data.collate import Collator, PackedCollator, PaddedCollator
from finetune.data.dataset import PreparedData, TokenizedRows
from finetune.distributed.interrupts import NotFiniteError
from finetune.training import shared_steps
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.batch_loss import held_out_loss
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval
from finetune.training.loading import Policy
from finetune.training.preflight.checklist import check_model, check_rows, check_vocabulary
from finetune.training.preflight.checks import CheckResult
from finetune.training.samples import Samples
from finetune.training.text_encoding import TextEncoding
from finetune.training.trainer import NativeTrainer
from finetune.training.trl_engine import build_trl_trainer

MAX_LOSS_FOR_EXP = 700.0
"""exp() of a larger loss overflows a float."""


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning of a policy on tokenized rows."""

    ctx: RunContext
    text: TextEncoding
    data: PreparedData
    policy: Policy

    @property
    def num_steps(self) -> int:
        return shared_steps.num_optimizer_steps(self.ctx, len(self.data.train))

    @property
    def samples(self) -> Samples:
        """Return the prompts of samples.jsonl."""
        return shared_steps.build_samples(self.ctx, self.text, self.data.prompts)

    @cached_property
    def generation_eval(self) -> GenerationEval:
        """Return the evaluation of generated completions, before and after training."""
        return shared_steps.build_generation_eval(self.ctx, self.text, self.data.prompts)

    def metadata(self) -> dict[str, Any]:
        """Run the pre-flight and return run.json's initial sections; every refusal happens here."""
        self.arguments()  # raises for engine arguments that the engine refuses
        self.ctx.add_summary_metrics(self.generation_eval.summary)
        shared_steps.log_parameter_counts(self.ctx, self.policy)
        self.preflight()
        return shared_steps.policy_metadata(self.ctx, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Check the run's rows and model before step 0, without changing either.

        Raises:
            UserError: a check failed.
        """
        ctx, text, data, policy = self.ctx, self.text, self.data, self.policy
        with ctx.timed("preflight"):
            ctx.check(CheckResult("environment", ctx.describe_environment(policy.precision)))
            blocks = ctx.recipe.settings.data.text_format is not None
            ctx.check(
                *check_rows(data.train, data.report, text.encoder, max_length=text.max_length, blocks=blocks),
                check_vocabulary(policy.model, data.train, text.encoder),
            )
            weight_format = {"precision": policy.precision, "quantization": policy.quantization}
            ctx.check(*check_model(policy.model, data.train, self._training_collator(), **weight_format))

    def arguments(self) -> TrainingArguments:
        """Return the engine's training arguments, with ``auto`` values resolved.

        Raises:
            UserError: the engine refuses them.
        """
        longest = self.data.report.longest
        return shared_steps.engine_arguments(self.ctx, self.policy, longest=longest, steps=self.num_steps)

    def build_trainer(self) -> Trainer:
        """Build the engine's trainer, which creates the checkpoint folder."""
        train = self.ctx.recipe.settings.train
        train_rows, held_out = self.data.train, self.data.held_out
        if train.engine == "trl":
            tokenizer = self.text.encoder.tokenizer
            args = self.arguments()
            return build_trl_trainer(
                self.policy.model, args, tokenizer, train_rows=train_rows, held_out_rows=held_out
            )
        trainer = NativeTrainer(
            self.policy.model,
            self.arguments(),
            train_rows=train_rows,
            held_out_rows=held_out,
            collator=self._build_collator(),
            batch_size=train.batch_size,
            group_by_length=train.group_by_length,
            hooks=adapter_hooks(self.policy.model, self.ctx.recipe.settings.adapter, steps=self.num_steps),
        )
        trainer.label_smoothing, trainer.neftune_alpha = train.label_smoothing, train.neftune_alpha
        return trainer

    def generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        """Generate completions greedily with the current policy."""
        return shared_steps.generate_sharded(self.ctx, self.text, self.policy, prompts)

    def evaluate(self, trainer: Trainer, when: str) -> None:
        """Record the held-out loss before or after training; after it, the training loss too.

        For plain documents also their perplexity per token, exp(loss).

        Raises:
            NotFiniteError: the held-out loss is NaN or infinite.
        """
        run = self.ctx.run
        # A resumed run keeps the metrics of the untrained model that its first start recorded.
        if self.data.held_out is not None and f"eval/loss_{when}" not in run.record.get("metrics", {}):
            with self.ctx.timed("held_out"):
                loss = self._held_out_loss(trainer, self.data.held_out)
            if not isfinite(loss):
                raise NotFiniteError(f"held-out loss is {loss} {when} training")
            run.update(metrics={f"eval/loss_{when}": loss})
            if self.ctx.recipe.settings.data.text_format is not None:
                run.update(metrics={f"eval/perplexity_{when}": exp(min(loss, MAX_LOSS_FOR_EXP))})
        if when == "after":
            shared_steps.record_training_metrics(self.ctx, trainer)

    def save(self) -> None:
        """Save the adapter (or the model), reload it to verify it, and record its checksums.

        Raises:
            UserError: the saved weights differ from the trained ones.
        """
        shared_steps.save_policy(self.ctx, self.text, self.policy)

    def _held_out_loss(self, trainer: Trainer, rows: TokenizedRows) -> float:
        return held_out_loss(
            trainer.model, rows, self._build_collator(), batch_size=trainer.args.per_device_train_batch_size
        )

    def _training_collator(self) -> Collator:
        """Return a collator with training's layout for the pre-flight: TRL's ``padding_free`` packs too."""
        train = self.ctx.recipe.settings.train
        if train.engine == "trl" and train.engine_args.get("padding_free"):
            return PackedCollator(self.text.encoder.stop_ids[0], single_row=True)
        return self._build_collator()

    def _build_collator(self) -> Collator:
        pad_id = self.text.encoder.stop_ids[0]
        if not self.ctx.recipe.settings.data.packing:
            return PaddedCollator(pad_id)
        attention = self.ctx.recipe.settings.model.attention
        # FlashAttention separates packed rows only within one batch row.
        return PackedCollator(pad_id, single_row=attention == "flash_attention_2")
