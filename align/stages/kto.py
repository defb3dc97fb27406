r"""Kahneman-Tversky optimization (KTO): completions labeled good or bad; no pairs, no reward model.

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8: L = E[w_y - v(x, y)], v = w_D s(beta (r - z)) for good
completions and w_U s(beta (z - r)) for bad ones, r = log pi(y|x) / ref(y|x), z the mean of r over mismatched
prompts and completions. The reference model is the initial policy. TRL's KTOTrainer runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.kto import settings as kto_settings
from align.kto.labels import KTO_METRICS
from align.kto.settings import KTODataSettings, KTOSettings, KTOTrainSettings
from finetune.recipe.settings import StageSettings
from finetune.training.metric_specs import MetricSpec

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from align.engines.trl.kto import TrlKTOTrainer
    from align.preference.rows.dataset import PreparedPreferences
    from finetune.training.context import RunContext
    from finetune.training.findings import Finding
    from finetune.training.model import Policy
    from finetune.training.text_encoding import TextEncoding

PUBLIC = "kto-mix"
"""The default recipe for a base model other than the embedded one."""


class Settings(StageSettings):
    """Recipe of stage kto: labeled completions and the KTO loss."""

    TRL_CONFIG: ClassVar[str] = "KTOConfig"

    data: KTODataSettings = KTODataSettings()
    train: KTOTrainSettings = KTOTrainSettings()
    kto: KTOSettings = KTOSettings()


RULES = kto_settings.RULES


def build(ctx: RunContext[Settings]) -> KTO:
    """Load tokenizer, labeled completions and model.

    Raises:
        UserError: the data are invalid, all completions have the same label, or the base cannot be loaded.
    """
    from align.kto.labels import require_both_labels
    from align.preference.rows.load import load_preferences
    from finetune.training.loading import load_policy, load_text_encoding

    text = load_text_encoding(ctx)
    data = load_preferences(ctx, ctx.settings.data, text, kind="labels")
    require_both_labels(data)
    return KTO(ctx, text, data, load_policy(ctx))


@dataclass(frozen=True)
class KTO:
    """KTO: trains a policy on completions labeled good or bad."""

    generates: ClassVar[bool] = True
    allows_zero_gradients: ClassVar[bool] = False
    metric_spec: ClassVar[MetricSpec] = KTO_METRICS

    ctx: RunContext[Settings]
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy

    @property
    def num_steps(self) -> int:
        from finetune.training.arguments import num_optimizer_steps

        return num_optimizer_steps(self.ctx.settings.train, len(self.data.train))

    def prepare(self) -> dict[str, Any]:
        """Check rows, model and label balance before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        from align.kto.labels import check_label_balance
        from align.preference.rows.completion_rows import to_completion_rows
        from finetune.data.collate import PaddedCollator
        from finetune.training.model import count_parameters
        from finetune.training.preflight.checklist import check_model, check_rows, check_vocabulary
        from finetune.training.preflight.checks import CheckResult

        ctx, text, data, policy = self.ctx, self.text, self.data, self.policy
        ctx.log(count_parameters(policy.model).describe())
        with ctx.timed("preflight"):
            ctx.check(CheckResult("environment", ctx.describe_environment(policy.precision)))
            rows = to_completion_rows(data.train)
            ctx.check(
                *check_rows(rows, data.report, text.encoder, max_length=text.max_length, blocks=False),
                check_vocabulary(policy.model, rows, text.encoder),
                check_label_balance(data.train, ctx.settings.kto),
            )
            collate = PaddedCollator(text.encoder.stop_ids[0])
            weight_format = {"precision": policy.precision, "quantization": policy.quantization}
            ctx.check(*check_model(policy.model, rows, collate, **weight_format))
        return {}

    def arguments(self) -> TrainingArguments:
        """Return TRL's training arguments, with every ``auto`` resolved.

        Raises:
            UserError: TRL refuses them.
        """
        from finetune.training.arguments import TrlConfigSpec, resolve_arguments

        loss_arguments = self.ctx.settings.kto.model_dump() | {"loss_type": "kto"}
        # At least two rows per micro-batch: each is paired with another row's completion to estimate z.
        stage = TrlConfigSpec(Settings.TRL_CONFIG, loss_arguments, min_rows=2)
        longest = self.data.train.longest
        return resolve_arguments(self.ctx, self.policy, longest=longest, steps=self.num_steps, stage=stage)

    def build_trainer(self, args: TrainingArguments) -> TrlKTOTrainer:
        """Return TRL's trainer, with the reference computed and checked against the initial policy.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        from align.engines.trl.kto import TrlKTOTrainer, check_initial_loss, training_order

        ctx, data, train = self.ctx, self.data, self.ctx.settings.train
        order = training_order(
            data.train, batch_size=train.batch_size, seed=train.seed, group_by_length=train.group_by_length
        )
        # Log-probabilities of the reference are computed only for rows that the steps use.
        used_rows = order[: self.num_steps * train.batch_size]
        with ctx.timed("reference"):
            trainer = TrlKTOTrainer(
                self.policy.model,
                args,
                self.text.encoder.tokenizer,
                train=data.train,
                held_out=data.held_out,
                order=used_rows,
            )
        seconds = ctx.seconds["reference"]
        ctx.log(f"reference log-probabilities of {len(used_rows)} completions: {seconds:.1f} s")
        ctx.check(check_initial_loss(trainer, ctx.settings.kto, self.policy.precision))
        return trainer

    def evaluate(self, trainer: Trainer, when: str) -> dict[str, float]:
        """Return loss, implicit rewards, their margin and the reference point z over the held-out rows."""
        if self.data.held_out is None:
            return {}
        metrics: dict[str, float] = trainer.held_out_metrics()
        return metrics

    def diagnose(self) -> list[Finding]:
        """Return no findings: the curves of rewards and z tell."""
        return []
