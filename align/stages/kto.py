r"""Kahneman-Tversky optimization (KTO): trains on completions labeled good or bad; needs no pairs.

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8: L = E[w_y - v(x, y)], v = w_D s(beta (r - z)) for good
completions and w_U s(beta (z - r)) for bad ones, r = log pi(y|x) / ref(y|x), z the mean of r over mismatched
prompts and completions. The reference model is the initial policy. TRL's KTOTrainer runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from align.preference.settings import PREFERENCE_SELECT, PROMPT_LENGTH, PreferenceSettings
from align.shared_rules import PREFERENCE_NEFTUNE, TRL_ONLY, TRL_REFERENCE_ONLY
from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.settings import AtLeastTwo, PositiveFloat, Section, StageSettings, TrainSettings
from finetune.training.metric_specs import MetricSpec

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from align.engines.trl.kto import TrlKTOTrainer
    from align.preference.rows.dataset import PreparedPreferences
    from finetune.training.context import RunContext
    from finetune.training.model import Policy, TextEncoding
    from finetune.training.stage import Method

PUBLIC = "kto-mix"
"""The default recipe for a base model other than the bundled one."""


class KTODataSettings(PreferenceSettings):
    """Labeled completions, one per row."""

    packing: Literal[False] = Field(False, description="off: one completion per row")


class KTOSettings(Section):
    """KTO's loss (arXiv 2402.01306, equation 8)."""

    beta: PositiveFloat = Field(
        0.1, description="risk aversion: a smaller beta lets the policy move farther from the reference"
    )
    desirable_weight: PositiveFloat = Field(1.0, description="weight of desirable (good) completions")
    undesirable_weight: PositiveFloat = Field(1.0, description="weight of undesirable (bad) completions")


class KTOTrainSettings(TrainSettings):
    """Training settings; TRL's trainer runs the stage."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    learning_rate: PositiveFloat = Field(5e-6, description="peak learning rate")
    batch_size: AtLeastTwo = Field(32, description="completions per optimizer step")


class Settings(StageSettings):
    """Recipe of stage kto: labeled completions and the KTO loss."""

    TRL_CONFIG: ClassVar[str] = "KTOConfig"

    data: KTODataSettings = KTODataSettings()
    train: KTOTrainSettings = KTOTrainSettings()
    kto: KTOSettings = KTOSettings()


RULES = (
    PREFERENCE_SELECT,
    PROMPT_LENGTH,
    PREFERENCE_NEFTUNE,
    Rule(
        "kto-label-smoothing",
        {"train.label_smoothing": bool},
        source="arXiv 2402.01306, equation 8: no token labels",
        problem=Problem(
            "train.label_smoothing",
            "{train.label_smoothing:g}",
            "0: it smooths token labels, but KTO labels completions",
            "train.label_smoothing=0",
        ),
    ),
    Rule(
        "kto-micro-batch",
        {"train.micro_batch_size": (1,)},
        source="trl 1.16, trainer/kto_trainer.py: completions rotated by one within each micro-batch",
        problem=Problem(
            "train.micro_batch_size",
            "1",
            "2 or more: the KL estimate pairs each prompt with another row's completion of the micro-batch",
            "train.micro_batch_size=auto",
        ),
    ),
    TRL_REFERENCE_ONLY,
    TRL_ONLY,
)
KTO_METRICS = MetricSpec(
    curves={
        "loss": "training loss (mean per completion)",
        "rewards/chosen": "implicit reward of good completions",
        "rewards/rejected": "implicit reward of bad completions",
        "rewards/margins": "implicit reward margin, good over bad",
        "kto/z": "reference point z (KL to the reference, nats per completion)",
        "eval/loss": "held-out loss",
        "eval/rewards/chosen": "held-out implicit reward of good completions",
        "eval/rewards/rejected": "held-out implicit reward of bad completions",
        "eval/rewards/margins": "held-out implicit reward margin",
        "eval/kto/z": "held-out reference point z",
    },
    summary={
        "loss": ("training loss", ".4f"),
        "eval/loss": ("held-out loss", ".4f"),
        "eval/rewards/chosen": ("held-out reward of good completions", ".3f"),
        "eval/rewards/rejected": ("held-out reward of bad completions", ".3f"),
        "eval/rewards/margins": ("held-out margin", ".3f"),
    },
    first_last=("loss", "rewards/margins", "kto/z"),
)


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, labeled completions and model.

    Raises:
        UserError: the data are invalid, all completions have the same label, or the base cannot be loaded.
    """
    from align.preference.rows.prepare import load_preferences
    from align.preference.rows.row_checks import require_both_labels
    from finetune.training.loading import load_policy, load_text_encoding

    text = load_text_encoding(ctx)
    data = load_preferences(ctx, ctx.settings.data, text, kind="labels")
    require_both_labels(data)
    return KTO(ctx, text, data, load_policy(ctx))


@dataclass(frozen=True)
class KTO:
    """KTO: trains a policy on completions labeled good or bad."""

    metric_spec: ClassVar[MetricSpec] = KTO_METRICS

    ctx: RunContext[Settings]
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy

    def prepare(self) -> dict[str, Any]:
        """Check rows, model and label balance before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        from align.preference.rows.dataset import to_completion_rows
        from align.preference.rows.row_checks import check_label_balance
        from finetune.data.collate import PaddedCollator
        from finetune.training.preflight.data_checks import check_tokenized
        from finetune.training.preflight.invariance_checks import check_model
        from finetune.training.stage import check_policy

        ctx, text, data, policy = self.ctx, self.text, self.data, self.policy
        with ctx.timed("preflight"):
            check_policy(ctx, policy)
            rows, weights = to_completion_rows(data.train), ctx.settings.kto.model_dump(exclude={"beta"})
            ctx.check(
                *check_tokenized(policy, rows, data.report, text),
                check_label_balance(data.train, **weights),
            )
            collate = PaddedCollator(text.encoder.stop_ids[0])
            ctx.check(*check_model(policy, rows, collate))
        return {}

    def training_arguments(self, num_steps: int) -> TrainingArguments:
        """Return TRL's training arguments, with every ``auto`` resolved.

        Raises:
            UserError: TRL refuses them.
        """
        from align.engines.trl.configs import KTO_CONFIG
        from finetune.training.arguments import resolve_arguments

        loss_arguments = self.ctx.settings.kto.model_dump() | {"loss_type": "kto"}
        trl_config = KTO_CONFIG.with_arguments(loss_arguments)
        longest = self.data.train.longest
        return resolve_arguments(
            self.ctx, self.policy, longest=longest, steps=num_steps, trl_config=trl_config
        )

    def build_trainer(self, args: TrainingArguments, num_steps: int) -> TrlKTOTrainer:
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
        used_rows = order[: num_steps * train.batch_size]
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
        ctx.check(check_initial_loss(trainer, self.policy.precision))
        return trainer
