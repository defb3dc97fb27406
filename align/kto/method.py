"""KTO method: builds trainer, pre-flight checks and metrics from a recipe."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from align.engines.trl.kto import KTOTrainerWithEval, build_trl_kto_trainer, training_order
from align.kto.settings import KTOSettings
from align.preference.losses.unpaired import weight_ratio
from align.preference.rows.completion_rows import to_completion_rows
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from align.preference.rows.load import load_preferences
from align.preference.settings import PreferenceSettings
from data_templates.segments import Message
from finetune.data.collate import PaddedCollator
from finetune.distributed.interrupts import NotFiniteError
from finetune.recipe.errors import Problem, UserError
from finetune.training import shared_steps
from finetune.training.arguments import TrlConfigSpec
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval
from finetune.training.metric_specs import MetricSpec
from finetune.training.model import Policy
from finetune.training.preflight.checklist import check_model, check_rows, check_vocabulary
from finetune.training.preflight.checks import CheckResult, failed
from finetune.training.preflight.preserve_state import preserve_state
from finetune.training.samples import Samples
from finetune.training.text_encoding import TextEncoding

KTO_METRIC_SPEC = MetricSpec(
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
)
RECOMMENDED_WEIGHT_RATIO = (1.0, 4 / 3)
"""Recommended ratio of total desirable to undesirable weight: arXiv 2402.01306, equation 9."""
KTO_LOSS_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Rounding tolerance for the initial loss."""


def load_labeled_completions(
    ctx: RunContext, settings: PreferenceSettings, text: TextEncoding
) -> PreparedPreferences:
    """Read and tokenize a recipe's labeled completions, and log the data report.

    Raises:
        UserError: mistakes in the data, or all completions have the same label.
    """
    data = load_preferences(ctx, settings, text, kind="labels")
    require_both_labels(data)
    return data


def require_both_labels(data: PreparedPreferences) -> None:
    """Raise if all rows are good or all bad, or if all training rows have one prompt.

    Raises:
        UserError: for the training rows or the held-out ones.
    """
    problems = []
    repairs = {
        "data.source": "train on good completions with `llm-align sft`",
        "data.held_out": "hold out more rows, or 0",
    }
    for key, rows in (("data.source", data.train), ("data.held_out", data.held_out)):
        num_good = 0 if rows is None else int((rows.scores == 1).sum())
        if rows is not None and num_good in (0, len(rows)):
            actual = f"{len(rows)} completions, all {'good' if num_good else 'bad'}"
            problems.append(Problem(key, actual, "good and bad completions", repairs[key]))
    if len({row.prompt_ids.tobytes() for row in _all_groups(data.train)}) == 1:
        actual = f"{len(data.train)} completions of one prompt"
        expected = "at least two prompts: KTO's KL estimate pairs prompts with completions of other prompts"
        problems.append(Problem("data.source", actual, expected, "add rows with other prompts"))
    if problems:
        raise UserError(problems)


def _all_groups(groups: PreferenceGroups) -> Sequence[Any]:
    return [groups[index] for index in range(len(groups))]


@dataclass(frozen=True)
class KTO:
    """KTO: trains a policy on completions labeled good or bad."""

    ctx: RunContext
    text: TextEncoding
    data: PreparedPreferences
    policy: Policy
    kto: KTOSettings

    @property
    def num_steps(self) -> int:
        return shared_steps.num_optimizer_steps(self.ctx, len(self.data.train))

    @property
    def samples(self) -> Samples:
        return shared_steps.build_samples(self.ctx, self.text, self.data.prompts)

    @cached_property
    def generation_eval(self) -> GenerationEval:
        return shared_steps.build_generation_eval(self.ctx, self.text, self.data.prompts)

    def metadata(self) -> dict[str, Any]:
        """Run the pre-flight and return run.json's initial sections; every refusal happens here."""
        self.ctx.add_summary_metrics(self.generation_eval.summary)
        # Built here too, so that invalid arguments are refused before step 0.
        self.arguments()
        shared_steps.log_parameter_counts(self.ctx, self.policy)
        self.preflight()
        return shared_steps.policy_metadata(self.ctx, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Check rows, model and label balance before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        ctx, text, data, policy = self.ctx, self.text, self.data, self.policy
        with ctx.timed("preflight"):
            ctx.check(CheckResult("environment", ctx.describe_environment(policy.precision)))
            rows = to_completion_rows(data.train)
            ctx.check(
                *check_rows(rows, data.report, text.encoder, max_length=text.max_length, blocks=False),
                check_vocabulary(policy.model, rows, text.encoder),
                check_label_balance(data.train, self.kto),
            )
            collate = PaddedCollator(text.encoder.stop_ids[0])
            storage = {"precision": policy.precision, "quantization": policy.quantization}
            ctx.check(*check_model(policy.model, rows, collate, **storage))

    def arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: the engine refuses them.
        """
        trl_settings = self.kto.model_dump() | {"loss_type": "kto"}
        # At least two rows per micro-batch: each is paired with another row's completion to estimate z.
        stage = TrlConfigSpec(self.ctx.recipe.settings.TRL_CONFIG, trl_settings, min_rows=2)
        longest = self.data.train.longest
        return shared_steps.engine_arguments(
            self.ctx, self.policy, longest=longest, steps=self.num_steps, stage=stage
        )

    def build_trainer(self) -> KTOTrainerWithEval:
        """Return TRL's trainer, with the reference computed and checked against the initial policy.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        train, rows = self.ctx.recipe.settings.train, self.data.train
        order = training_order(
            rows, batch_size=train.batch_size, seed=train.seed, group_by_length=train.group_by_length
        )
        # Log-probabilities of the reference are computed only for rows that the steps use.
        used_rows = order[: self.num_steps * train.batch_size]
        started = time.monotonic()
        with self.ctx.timed("reference"):
            trainer = build_trl_kto_trainer(
                self.policy.model,
                self.arguments(),
                self.text.encoder.tokenizer,
                train=rows,
                held_out=self.data.held_out,
                order=used_rows,
            )
        self.ctx.log(
            f"reference log-probabilities of {len(used_rows)} completions: {time.monotonic() - started:.1f} s"
        )
        self.ctx.check(check_kto_initial_loss(trainer, self.kto, KTO_LOSS_TOLERANCE[self.policy.precision]))
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
        if self.data.held_out is not None and f"eval/loss_{when}" not in run.record.get("metrics", {}):
            with self.ctx.timed("held_out"):
                metrics = trainer.held_out_metrics()
            if not isfinite(metrics["loss"]):
                raise NotFiniteError(f"held-out loss is {metrics['loss']} {when} training")
            run.update(metrics={f"eval/{name}_{when}": value for name, value in metrics.items()})
        if when == "after":
            shared_steps.record_training_metrics(self.ctx, trainer, ("loss", "rewards/margins", "kto/z"))

    def save(self) -> None:
        """Save the adapter (or the model), reload it, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        shared_steps.save_policy(self.ctx, self.text, self.policy)


def check_label_balance(rows: PreferenceGroups, kto: KTOSettings) -> CheckResult:
    """Check the ratio of desirable to undesirable weight, and suggest the paper's if it is out of range."""
    num_good = int((rows.scores == 1).sum())
    num_bad = len(rows) - num_good
    weights = {"desirable_weight": kto.desirable_weight, "undesirable_weight": kto.undesirable_weight}
    ratio, (low, high) = weight_ratio(num_good, num_bad, **weights), RECOMMENDED_WEIGHT_RATIO
    detail = f"{num_good} good completions, {num_bad} bad; weighted {ratio:.2f} to 1"
    # 1e-9: 4/3 and products of weights are not exact in floating point.
    if low - 1e-9 <= ratio <= high + 1e-9:
        return CheckResult("balance", detail)
    if ratio < low:
        advice = f"kto.desirable_weight={kto.desirable_weight * low / ratio:.3g}"
    else:
        advice = f"kto.undesirable_weight={kto.undesirable_weight * ratio / high:.3g}"
    return CheckResult("balance", f"{detail} (recommended: 1 to 1.33): {advice}", warned=True)


@torch.no_grad()
def check_kto_initial_loss(trainer: KTOTrainerWithEval, kto: KTOSettings, tolerance: float) -> CheckResult:
    """Check that policy equals reference: each completion's loss is half its weight, s(0) = 1/2."""
    rows = [trainer.train_dataset[index] for index in range(trainer.args.per_device_train_batch_size)]
    cpu_batch: dict[str, Tensor] = trainer.data_collator(rows)
    batch = {name: value.to(trainer.args.device) for name, value in cpu_batch.items()}
    desirable = cpu_batch["label"].numpy()
    # z is 0 as well: policy and reference are equal on the mismatched completions too.
    expected = float(np.where(desirable, kto.desirable_weight, kto.undesirable_weight).mean() / 2)
    with preserve_state(trainer.model), trainer.accelerator.autocast():
        loss = float(trainer.compute_loss(trainer.model, batch))
    detail = f"policy equals reference before step 0: loss {loss:.4f}, expected {expected:.4f}"
    if abs(loss - expected) <= tolerance:
        return CheckResult("start", detail)
    problem = Problem(
        "train.engine", f"initial loss {loss:.4f}", f"{expected:.4f}: policy equals reference before step 0"
    )
    return failed("start", problem)
