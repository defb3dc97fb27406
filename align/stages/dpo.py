r"""Direct preference optimization (DPO): trains on pairs or ranked lists, without a reward model.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: L = -E log s(beta [log pi(y_w|x) / ref(y_w|x) - log
pi(y_l|x) / ref(y_l|x)]), y_w preferred to y_l; the reference model is the initial policy. ``dpo.loss``
selects the variants on pairs and ranked lists, with and without a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from align.dpo.diagnostics import DPO_METRICS, DiagnosticInputs, diagnose_dpo
from align.dpo.settings import RULES as RULES
from align.dpo.settings import DPOSettings, DPOTrainSettings
from align.preference.losses.catalog import Loss, Setting, find_loss
from align.preference.settings import PreferenceSettings
from finetune.recipe.settings import StageSettings
from finetune.training.metric_specs import MetricSpec

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from align.dpo.collate import PreferenceDataset
    from align.dpo.objective import PreferenceObjective
    from align.dpo.preflight import BatchLayout
    from align.dpo.trainer import PreferenceTrainer
    from align.engines.trl.dpo import TrlDPOTrainer
    from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
    from finetune.training.context import RunContext
    from finetune.training.findings import Finding
    from finetune.training.model import Policy, TextEncoding
    from finetune.training.stage import Method

PUBLIC = "ultrafeedback"
"""The default recipe for a base model other than the bundled one."""


class Settings(StageSettings):
    """Recipe of stage dpo: preference data and the loss."""

    TRL_CONFIG: ClassVar[str] = "DPOConfig"

    data: PreferenceSettings = PreferenceSettings()
    train: DPOTrainSettings = DPOTrainSettings()
    dpo: DPOSettings = DPOSettings()


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, preferences and model.

    Raises:
        UserError: the data are invalid, or the base cannot be loaded.
    """
    from align.preference.rows.prepare import load_preferences
    from finetune.training.loading import load_policy, load_text_encoding

    text = load_text_encoding(ctx)
    data = load_preferences(ctx, ctx.settings.data, text)
    return DPO(ctx, text, data, load_policy(ctx))


@dataclass
class DPO:
    """DPO and its variants: trains a policy on preference pairs and ranked lists.

    Attributes:
        ctx: the run context.
        text: template and tokenizer.
        data: training and held-out groups.
        policy: the trained model.
        layout: of the batches; ``prepare`` selects it, after the checks that its forward passes need.
    """

    metric_spec: ClassVar[MetricSpec] = DPO_METRICS

    ctx: RunContext[Settings]
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy
    layout: BatchLayout = field(init=False)

    @property
    def uses_trl(self) -> bool:
        return self.ctx.settings.train.engine == "trl"

    @property
    def loss(self) -> Loss:
        return find_loss(self.ctx.settings.dpo.loss_name, where="dpo.loss")

    @property
    def loss_settings(self) -> dict[str, Setting]:
        return self.loss.settings(self.ctx.settings.dpo.loss_settings, where="dpo.loss")

    @cached_property
    def objective(self) -> PreferenceObjective:
        from align.dpo.objective import PreferenceObjective

        return PreferenceObjective.from_loss(self.loss, self.loss_settings)

    def prepare(self) -> dict[str, Any]:
        """Check rows, model, layout and gradients before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        from align.dpo.preflight import check_preference_gradients
        from align.preference.rows.dataset import to_completion_rows
        from align.preference.rows.row_checks import require_pairs
        from finetune.training.preflight.data_checks import check_tokenized
        from finetune.training.stage import check_policy

        ctx, data, policy = self.ctx, self.data, self.policy
        with ctx.timed("preflight"):
            check_policy(ctx, policy)
            if self.uses_trl:
                require_pairs(data)
            # The row checks of SFT apply to each prompt with one completion.
            rows = to_completion_rows(data.train)
            ctx.check(*check_tokenized(policy, rows, data.report, self.text))
            self.layout = self._select_layout()
            ctx.check(*self.layout.results)
            ctx.check(*check_preference_gradients(policy, data.train, self.layout.collator, self.objective))
        return {}

    def training_arguments(self, num_steps: int) -> TrainingArguments:
        """Return the engine's training arguments, with every ``auto`` resolved.

        Raises:
            UserError: the engine refuses them.
        """
        from align.dpo.settings import trl_loss_arguments
        from align.engines.trl.configs import DPO_CONFIG
        from finetune.training.arguments import resolve_arguments

        # The micro-batch size is resolved for the largest group.
        longest, trl_config = self.layout.longest_row(self.data.train), DPO_CONFIG
        if self.uses_trl:
            trl_config = DPO_CONFIG.with_arguments(trl_loss_arguments(self.loss.name, self.loss_settings))
        return resolve_arguments(
            self.ctx, self.policy, longest=longest, steps=num_steps, trl_config=trl_config
        )

    def build_trainer(self, args: TrainingArguments, num_steps: int) -> Trainer:
        """Return the engine's trainer, with the reference computed and checked against the initial policy.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        from align.dpo.trainer import ChosenLogpStop

        trainer = (
            self._build_trl_trainer(args) if self.uses_trl else self._build_native_trainer(args, num_steps)
        )
        max_drop = self.ctx.settings.dpo.max_chosen_logp_drop
        if max_drop is not None:
            trainer.add_callback(ChosenLogpStop(self.ctx, max_drop))
        return trainer

    def diagnose(self) -> list[Finding]:
        """Return the findings on falling log-probabilities, KL, overfitting, length and repetition."""
        from align.dpo.collate import data_length_ratio

        run = self.ctx.run
        inputs = DiagnosticInputs(
            metrics=run.record["metrics"],
            length_ratio=data_length_ratio(self.data.train),
            completions=[(entry["before"], entry["after"]) for entry in run.samples()],
            has_nll_term=self.loss.needs.nll,
            num_held_out=0 if self.data.held_out is None else len(self.data.held_out),
        )
        return diagnose_dpo(inputs)

    def _select_layout(self) -> BatchLayout:
        """Return the batches' layout: shared prompts, or TRL's own layout of one completion per row."""
        from align.dpo.collate import PreferenceCollator
        from align.dpo.preflight import BatchLayout, select_layout

        pad_id = self.text.encoder.stop_ids[0]
        if self.uses_trl:
            return BatchLayout(PreferenceCollator(pad_id, one_per_row=True))
        virtual_tokens = self.text.virtual_tokens
        return select_layout(self.policy, self.data.train, pad_id=pad_id, virtual_tokens=virtual_tokens)

    def _build_native_trainer(self, args: TrainingArguments, num_steps: int) -> PreferenceTrainer:
        from align.dpo.collate import PreferenceDataset
        from align.dpo.preflight import check_policy_equals_reference
        from align.dpo.reference_logps import ReferenceLogps, rows_seen_by_run
        from align.dpo.trainer import PreferenceTrainer
        from align.preference.reference_policy import ReferencePolicy
        from finetune.training.adapter_hooks import adapter_hooks
        from finetune.training.trainer import TrainerData

        ctx, policy, data, train = self.ctx, self.policy, self.data, self.ctx.settings.train
        needs_reference, is_live = self.objective.needs_reference, ctx.settings.dpo.reference == "live"
        # Copied before a checkpoint is loaded: in a resumed run too, the reference is the initial policy.
        live = ReferencePolicy(policy.model) if needs_reference and is_live else None
        # Log-probabilities of the reference are computed only for groups that the steps use.
        used_rows = rows_seen_by_run(data.train.lengths.tolist(), train, steps=num_steps)
        reference = ReferenceLogps(ctx, policy, self.layout.collator, args.per_device_train_batch_size)

        def dataset(groups: PreferenceGroups, rows: Sequence[int]) -> PreferenceDataset:
            precomputed = needs_reference and not is_live
            return PreferenceDataset(groups, reference.compute(groups, rows) if precomputed else None)

        trainer_data = TrainerData(
            dataset(data.train, used_rows),
            None if data.held_out is None else dataset(data.held_out, range(len(data.held_out))),
            self.layout.collator,
            train.batch_size,
            train.group_by_length,
        )
        trainer = PreferenceTrainer(
            policy.model,
            args,
            trainer_data,
            objective=self.objective,
            reference_policy=live,
            precision=policy.precision,
            hooks=adapter_hooks(policy.model, ctx.settings.adapter, steps=num_steps),
        )
        if needs_reference:
            ctx.check(check_policy_equals_reference(trainer, policy, used_rows))
        return trainer

    def _build_trl_trainer(self, args: TrainingArguments) -> TrlDPOTrainer:
        from align.engines.trl.dpo import TrlDPOTrainer, check_initial_loss

        ctx, data = self.ctx, self.data
        with ctx.timed("reference"):
            trainer = TrlDPOTrainer(
                self.policy.model,
                args,
                self.text.encoder.tokenizer,
                train=data.train,
                held_out=data.held_out,
                loss=self.objective.loss,
            )
        ctx.log(f"reference log-probabilities of {len(data.train)} pairs: {ctx.seconds['reference']:.1f} s")
        ctx.check(check_initial_loss(trainer, self.policy.precision))
        return trainer
