"""Supervised fine-tuning (SFT) on prompts and assistant replies.

The loss is the mean negative log-likelihood per reply token (Ouyang et al. 2022, arXiv 2203.02155, section
3.5; Wei et al. 2021, arXiv 2109.01652): L = -(1/N) sum_t m_t log p(x_t | x_<t), m_t = 1 where token t is
the assistant's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.settings import EvaluateSettings, StageSettings
from finetune.training.metric_specs import SUPERVISED_METRICS, Diagnostics, MetricSpec, When

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from finetune.data.collate import Collator
    from finetune.data.dataset import PreparedData
    from finetune.training.context import RunContext
    from finetune.training.label_eval import LabelEval
    from finetune.training.model import Policy, TextEncoding
    from finetune.training.stage import Method

PUBLIC = "alpaca"
"""Default recipe if a base other than the bundled one is given without a recipe."""
MAX_LOSS_FOR_EXP = 700.0
"""exp() of a larger loss overflows a float."""
SUMMARY = {
    "eval/classification/accuracy": ("held-out accuracy", ".1%"),
    "eval/classification/macro_f1": ("held-out macro-F1", ".3f"),
    "eval/classification/calibration_error": ("calibration error", ".3f"),
    **SUPERVISED_METRICS.summary,
}
"""A classifier's metrics come first; other runs do not have them."""


class SftEvaluateSettings(EvaluateSettings):
    """Evals before and after training, on held-out rows."""

    classification: bool = Field(
        False,
        description="replies are labels: classify held-out rows by the likelihood of each label of the "
        "training rows; accuracy, macro-F1, metrics per class, confusion matrix, calibration",
    )


class Settings(StageSettings):
    """Settings of every stage: model, data, adapter, training and evaluation."""

    evaluate: SftEvaluateSettings = SftEvaluateSettings()


RULES = (
    Rule(
        "classification-loss",
        when={"evaluate.classification": (True,), "data.loss_on": ("all",)},
        source="finetune/training/label_eval.py: a row's label is its part with loss",
        problem=Problem(
            "evaluate.classification",
            "true, with data.loss_on=all",
            "false, or loss on the replies only: a row's label is its part with loss",
            "data.loss_on=assistant",
        ),
    ),
)


def build(ctx: RunContext) -> Method:
    """Load tokenizer, data and model.

    Raises:
        UserError: the data are invalid, or the base cannot be loaded.
    """
    from finetune.training.loading import load_data, load_policy, load_text_encoding

    text = load_text_encoding(ctx)
    data = load_data(ctx, text)
    evaluate = ctx.settings.evaluate
    # Continued pretraining is built here too, and has no labels.
    classifies = isinstance(evaluate, SftEvaluateSettings) and evaluate.classification
    labels = _label_eval(ctx, data, text) if classifies else None
    return SFT(ctx, text, data, load_policy(ctx), labels)


def _label_eval(ctx: RunContext, data: PreparedData, text: TextEncoding) -> LabelEval:
    """Return the classification of a run's held-out rows, and log what its labels are.

    Raises:
        UserError: there are no held-out rows, or the replies are no labels.
    """
    from finetune.training.label_eval import LabelEval

    labels = LabelEval.of(data.train, data.held_out, text.encoder)
    for line in labels.notes():
        ctx.log(line)
    return labels


def _classification_diagnostics(record: Mapping[str, Any]) -> Diagnostics:
    from finetune.training.label_eval import classification_diagnostics

    return classification_diagnostics(record)


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning of a policy on tokenized rows; also continued pretraining and CoH."""

    metric_spec: ClassVar[MetricSpec] = replace(
        SUPERVISED_METRICS, summary=SUMMARY, diagnostics=_classification_diagnostics
    )

    ctx: RunContext
    text: TextEncoding
    data: PreparedData
    policy: Policy
    labels: LabelEval | None = None

    def prepare(self) -> dict[str, Any]:
        """Check the run's rows and model before step 0, without changing either.

        Raises:
            UserError: a check failed.
        """
        from finetune.training.preflight.data_checks import check_tokenized
        from finetune.training.preflight.invariance_checks import check_model
        from finetune.training.stage import check_policy

        ctx, data, policy = self.ctx, self.data, self.policy
        with ctx.timed("preflight"):
            check_policy(ctx, policy)
            blocks = ctx.settings.data.text_format is not None
            conversations = None if blocks else data.prompts
            ctx.check(
                *check_tokenized(
                    policy, data.train, data.report, self.text, blocks=blocks, conversations=conversations
                )
            )
            ctx.check(*check_model(policy, data.train, self._training_collator()))
        return {}

    def training_arguments(self, num_steps: int) -> TrainingArguments:
        """Return the engine's training arguments, with ``auto`` values resolved.

        Raises:
            UserError: the engine refuses them.
        """
        from finetune.training.arguments import resolve_arguments

        longest = self.data.report.longest
        return resolve_arguments(self.ctx, self.policy, longest=longest, steps=num_steps)

    def build_trainer(self, args: TrainingArguments, num_steps: int) -> Trainer:
        """Return the engine's trainer, which creates the checkpoint folder."""
        from finetune.engines.trl.trainer import TrlSFTTrainer
        from finetune.training.adapter_hooks import adapter_hooks
        from finetune.training.trainer import NativeTrainer, TrainerData

        settings, model, rows = self.ctx.settings, self.policy.model, self.data.train
        train = settings.train
        if train.engine == "trl":
            tokenizer = self.text.encoder.tokenizer
            return TrlSFTTrainer(model, args, tokenizer, train=rows, held_out=self.data.held_out)
        collator = self._build_collator()
        return NativeTrainer(
            model,
            args,
            TrainerData(rows, self.data.held_out, collator, train.batch_size, train.group_by_length),
            hooks=adapter_hooks(model, settings.adapter, steps=num_steps),
            label_smoothing=train.label_smoothing,
            neftune_alpha=train.neftune_alpha,
        )

    def evaluate(self, trainer: Trainer, when: When) -> dict[str, float]:
        """Return the held-out loss; for plain documents also their perplexity per token, exp(loss)."""
        if self.data.held_out is None:
            return {}
        metrics: dict[str, float] = trainer.held_out_metrics()
        if self.labels is not None:
            metrics |= self.labels.record(self.ctx.run, self.policy.model, when)
        if self.ctx.settings.data.text_format is not None:
            metrics["perplexity"] = exp(min(metrics["loss"], MAX_LOSS_FOR_EXP))
        return metrics

    def _training_collator(self) -> Collator:
        """Return a collator with training's layout for the pre-flight: TRL's ``padding_free`` packs too."""
        from finetune.data.collate import PackedCollator

        train = self.ctx.settings.train
        if train.engine == "trl" and train.engine_args.get("padding_free"):
            return PackedCollator(self.text.encoder.stop_ids[0], single_row=True)
        return self._build_collator()

    def _build_collator(self) -> Collator:
        from finetune.data.collate import PackedCollator, PaddedCollator

        pad_id, settings = self.text.encoder.stop_ids[0], self.ctx.settings
        if not settings.data.packing:
            return PaddedCollator(pad_id)
        # FlashAttention separates packed rows only within one batch row.
        return PackedCollator(pad_id, single_row=settings.model.attention == "flash_attention_2")
