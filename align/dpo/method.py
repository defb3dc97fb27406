"""DPO method: builds reference, trainer, pre-flight checks and metrics from a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from transformers import Trainer, TrainingArguments

from align.dpo import diagnostics, preflight
from align.dpo.collate import PreferenceCollator, PreferenceDataset, data_length_ratio
from align.dpo.objective import PreferenceObjective
from align.dpo.reference_cache import ReferenceLogps
from align.dpo.reference_logps import rows_seen_by_run
from align.dpo.settings import DPOSettings
from align.dpo.stop_rule import HELD_OUT_CHOSEN_LOGPS, ChosenLogpStop
from align.dpo.trainer import PreferenceTrainer
from align.dpo.trl_losses import trl_loss_arguments
from align.engines.trl.dpo import build_trl_dpo_trainer, check_trl_dpo_initial_loss
from align.engines.trl.preference import require_pairs
from align.preference.attention import block_mask_unsupported, forward_cost, unwrap_model
from align.preference.losses.catalog import Loss, find_loss
from align.preference.reference_policy import ReferencePolicy
from align.preference.rows.completion_rows import to_completion_rows
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from data_templates.segments import Message
from finetune.adapters.traits import Hooks
from finetune.distributed.interrupts import NotFiniteError
from finetune.training import shared_steps
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.arguments import SFT_CONFIG, TrlConfigSpec
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.model import Policy
from finetune.training.preflight.checklist import check_rows, check_vocabulary
from finetune.training.preflight.checks import CheckResult
from finetune.training.samples import Samples
from finetune.training.text_encoding import TextEncoding

DPO_FIRST_LAST_METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logratios/chosen",
    "logratios/rejected",
    "objective/kl_per_token",
)
"""Metrics recorded from the first training step and the last ones."""


@dataclass(frozen=True)
class DPO:
    """DPO and its variants: trains a policy on preference pairs and ranked lists."""

    ctx: RunContext
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy
    dpo: DPOSettings

    @property
    def num_steps(self) -> int:
        return shared_steps.num_optimizer_steps(self.ctx, len(self.data.train))

    @property
    def samples(self) -> Samples:
        """Return the sample prompts; the expected reply is the best completion."""
        return shared_steps.build_samples(self.ctx, self.text, self.data.prompts)

    @cached_property
    def generation_eval(self) -> GenerationEval:
        return shared_steps.build_generation_eval(self.ctx, self.text, self.data.prompts)

    @property
    def loss(self) -> Loss:
        return find_loss(self.dpo.loss_name, where="dpo.loss")

    @cached_property
    def hooks(self) -> Hooks:
        return adapter_hooks(self.policy.model, self.ctx.recipe.settings.adapter, steps=self.num_steps)

    @cached_property
    def objective(self) -> PreferenceObjective:
        return PreferenceObjective.from_loss(
            self.loss, self.loss.settings(self.dpo.loss_settings, where="dpo.loss")
        )

    @cached_property
    def collator(self) -> PreferenceCollator:
        """Return the collator: shared prompts if this model can take a block mask; logs the decision."""
        pad_id, groups = self.text.encoder.stop_ids[0], self.data.train
        # TRL's own collator has one completion per row.
        if self.uses_trl:
            return PreferenceCollator(pad_id, one_per_row=True)
        storage = {"precision": self.policy.precision, "quantization": self.policy.quantization}
        # Virtual tokens take positions too, which count against an attention window.
        reason = block_mask_unsupported(
            unwrap_model(self.policy.model).config, max_positions=groups.longest + self.text.virtual_tokens
        )
        if reason:
            self.ctx.check(CheckResult("layout", f"prompt sharing off: {reason}"))
            return PreferenceCollator(pad_id, one_per_row=True)
        result = preflight.check_prompt_sharing(self.policy.model, groups, pad_id=pad_id, **storage)
        self.ctx.check(result)
        return PreferenceCollator(pad_id, one_per_row=result.warned, cost=forward_cost(self.policy.model))

    @property
    def uses_trl(self) -> bool:
        return self.ctx.recipe.settings.train.engine == "trl"

    def metadata(self) -> dict[str, Any]:
        """Run the pre-flight and return run.json's initial sections; every refusal happens here."""
        self.ctx.add_summary_metrics(self.generation_eval.summary)
        shared_steps.log_parameter_counts(self.ctx, self.policy)
        self.preflight()
        # Built here too, so that invalid arguments are refused before step 0.
        self.arguments()
        return shared_steps.policy_metadata(self.ctx, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Check rows, model, layout and gradients before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        ctx, text, data, policy = self.ctx, self.text, self.data, self.policy
        if self.uses_trl:
            require_pairs(data.train, where="data.source")
            if data.held_out is not None:
                require_pairs(data.held_out, where="data.held_out")
        with ctx.timed("preflight"):
            ctx.check(CheckResult("environment", ctx.describe_environment(policy.precision)))
            # The row checks of SFT apply to each prompt with one completion.
            rows = to_completion_rows(data.train)
            ctx.check(
                *check_rows(rows, data.report, text.encoder, max_length=text.max_length, blocks=False),
                check_vocabulary(policy.model, rows, text.encoder),
            )
            storage = {"precision": policy.precision, "quantization": policy.quantization}
            ctx.check(
                *preflight.check_preference_gradients(
                    policy.model, data.train, self.collator, objective=self.objective, **storage
                )
            )

    def arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: the engine refuses them.
        """
        # The micro-batch size is resolved for the largest group of the layout: a row with the prompt once, or
        # a padded row per completion.
        longest = int(self.data.train.lengths.max())
        if self.collator.one_per_row:
            longest = self.data.train.longest * int(self.data.train.num_completions.max())
        stage = SFT_CONFIG
        if self.uses_trl:
            settings = self.loss.settings(self.dpo.loss_settings, where="dpo.loss")
            stage = TrlConfigSpec(
                self.ctx.recipe.settings.TRL_CONFIG, trl_loss_arguments(self.loss.name, settings)
            )
        return shared_steps.engine_arguments(
            self.ctx, self.policy, longest=longest, steps=self.num_steps, stage=stage
        )

    def build_trainer(self) -> Trainer:
        """Return the engine's trainer, with the reference computed and checked against the initial policy.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        trainer = self._trl_trainer() if self.uses_trl else self._native_trainer()
        if self.dpo.max_chosen_logp_drop is not None:
            # The value before training is recorded after the trainer is built, hence a callable.
            max_drop, run = self.dpo.max_chosen_logp_drop, self.ctx.run
            trainer.add_callback(
                ChosenLogpStop(
                    max_drop,
                    initial=lambda: run.record["metrics"][f"{HELD_OUT_CHOSEN_LOGPS}_before"],
                    log=self._log_stop,
                )
            )
        return trainer

    def generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        """Generate greedy completions with the current policy."""
        return shared_steps.generate_sharded(self.ctx, self.text, self.policy, prompts)

    def evaluate(self, trainer: Trainer, when: str) -> None:
        """Record the held-out metrics before or after training, and training's first and last metrics.

        Raises:
            NotFiniteError: the held-out loss is NaN or infinite.
        """
        run = self.ctx.run
        # A resumed run has its `before` metrics already.
        recorded = run.record.get("metrics", {})
        if self.data.held_out is not None and f"{EVAL_PREFIX}loss_{when}" not in recorded:
            with self.ctx.timed("held_out"):
                metrics = trainer.held_out_metrics(trainer.eval_dataset)
            if not isfinite(metrics["loss"]):
                raise NotFiniteError(f"held-out loss is {metrics['loss']} {when} training")
            run.update(metrics={f"{EVAL_PREFIX}{name}_{when}": value for name, value in metrics.items()})
        if when == "after":
            shared_steps.record_training_metrics(self.ctx, trainer, DPO_FIRST_LAST_METRICS)

    def save(self) -> None:
        """Save the adapter (or the model), reload it, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        shared_steps.save_policy(self.ctx, self.text, self.policy)

    def diagnose(self) -> None:
        """Log and record the diagnostics of the run."""
        run = self.ctx.run
        completions = [(entry["before"], entry["after"]) for entry in run.samples()]
        inputs = diagnostics.DiagnosticInputs(
            metrics=run.record["metrics"],
            length_ratio=data_length_ratio(self.data.train),
            completions=completions,
            has_nll_term=self.loss.needs.nll,
        )
        findings = diagnostics.diagnose_dpo(inputs)
        for finding in findings:
            self.ctx.log(finding.format_line())
        run.update(diagnostics=[finding.record() for finding in findings])

    def _native_trainer(self) -> PreferenceTrainer:
        train, args = self.ctx.recipe.settings.train, self.arguments()
        is_live = self.objective.needs_reference and self.dpo.reference == "live"
        # Copied before a checkpoint is loaded: in a resumed run too, the reference is the initial policy.
        reference_policy = ReferencePolicy(self.policy.model) if is_live else None
        used_rows, held_out = self._rows_seen_by_run(), self.data.held_out
        batch_size = args.per_device_train_batch_size
        trainer = PreferenceTrainer(
            self.policy.model,
            args,
            train_rows=self._dataset(self.data.train, used_rows, batch_size),
            held_out_rows=None
            if held_out is None
            else self._dataset(held_out, range(len(held_out)), batch_size),
            collator=self.collator,
            batch_size=train.batch_size,
            group_by_length=train.group_by_length,
            hooks=self.hooks,
        )
        # Set before the check below, which runs the forward pass of training.
        trainer.objective, trainer.reference_policy, trainer.precision = (
            self.objective,
            reference_policy,
            self.policy.precision,
        )
        if self.objective.needs_reference:
            checked_rows = preflight.evenly_spaced_rows(used_rows)
            self.ctx.check(
                preflight.check_policy_equals_reference(
                    trainer, checked_rows, quantization=self.policy.quantization
                )
            )
        return trainer

    def _trl_trainer(self) -> Trainer:
        with self.ctx.timed("reference"):
            trainer = build_trl_dpo_trainer(
                self.policy.model,
                self.arguments(),
                self.text.encoder.tokenizer,
                train=self.data.train,
                held_out=self.data.held_out,
                loss=self.objective.loss,
            )
        self.ctx.log(
            f"reference log-probabilities of {len(self.data.train)} pairs: "
            f"{self.ctx.seconds['reference']:.1f} s"
        )
        self.ctx.check(check_trl_dpo_initial_loss(trainer, self.policy.precision))
        return trainer

    def _rows_seen_by_run(self) -> list[int]:
        """Return the groups that the run's steps use."""
        train = self.ctx.recipe.settings.train
        return rows_seen_by_run(
            self.data.train.lengths.tolist(),
            steps=self.num_steps,
            batch_size=train.batch_size,
            seed=train.seed,
            group_by_length=train.group_by_length,
        )

    def _dataset(self, groups: PreferenceGroups, rows: Sequence[int], batch_size: int) -> PreferenceDataset:
        """Return groups with precomputed reference log-probabilities, if the loss needs them."""
        if not self.objective.needs_reference or self.dpo.reference == "live":
            return PreferenceDataset(groups)
        return PreferenceDataset(
            groups, ReferenceLogps(self.ctx, self.policy, self.collator, batch_size).compute(groups, rows)
        )

    def _log_stop(self, reason: str) -> None:
        self.ctx.log(reason)
        self.ctx.run.update(stop_reason=reason)
