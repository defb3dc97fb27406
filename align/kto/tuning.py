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

from align.kto.settings import KtoSettings
from align.kto.trl_engine import MeasuredKTOTrainer, training_order, trl_kto_trainer
from align.preference.losses.unpaired import balance
from align.preference.rows.completion_rows import as_rows
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from align.preference.rows.load import load_preferences
from align.preference.settings import PreferenceSettings
from data_templates._segments import Message
from finetune.data.collate import PaddedCollator
from finetune.recipe.errors import Problem, UserError
from finetune.training import tuning
from finetune.training.arguments import TrlStage
from finetune.training.behaviour import Behaviour
from finetune.training.generate import Reply
from finetune.training.job import Job
from finetune.training.loading import Policy
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.preflight.untouched import untouched
from finetune.training.preflight.whole import model_ticks, row_ticks, vocabulary_tick
from finetune.training.samples import Samples
from finetune.training.stops import NotFiniteError
from finetune.training.text import Text
from finetune.training.watched import Watched

WATCHED = Watched(
    curves={
        "loss": "training loss (mean per completion)",
        "chosen_reward": "implicit reward of good completions",
        "rejected_reward": "implicit reward of bad completions",
        "margin": "implicit reward margin, good over bad",
        "kl": "reference point z (KL to the reference, nats per completion)",
        "held_out_loss": "held-out loss",
        "held_out_chosen_reward": "held-out implicit reward of good completions",
        "held_out_rejected_reward": "held-out implicit reward of bad completions",
        "held_out_margin": "held-out implicit reward margin",
        "held_out_kl": "held-out reference point z",
    },
    numbers={
        "loss": ("training loss", ".4f"),
        "held_out_loss": ("held-out loss", ".4f"),
        "held_out_chosen_reward": ("held-out reward of good completions", ".3f"),
        "held_out_rejected_reward": ("held-out reward of bad completions", ".3f"),
        "held_out_margin": ("held-out margin", ".3f"),
    },
)
RATIO = (1.0, 4 / 3)
"""Recommended ratio of total desirable to undesirable weight: arXiv 2402.01306, equation 9."""
START = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Rounding tolerance for the initial loss."""


def load_labels(job: Job, settings: PreferenceSettings, text: Text) -> PreparedPreferences:
    """Read and tokenize a recipe's labeled completions, and log the data report.

    Raises:
        UserError: mistakes in the data, or all completions have the same label.
    """
    data = load_preferences(job, settings, text, kind="labels")
    refuse_one_sided(data)
    return data


def refuse_one_sided(data: PreparedPreferences) -> None:
    """Raise if all rows are good or all bad, or if all training rows have one prompt.

    Raises:
        UserError: for the training rows or the held-out ones.
    """
    problems = []
    repairs = {
        "data.source": "train on good completions with `llm-align sft`",
        "data.held_out": "hold out more rows, or 0",
    }
    for where, rows in (("data.source", data.train), ("data.held_out", data.held_out)):
        good = 0 if rows is None else int((rows.scores == 1).sum())
        if rows is not None and good in (0, len(rows)):
            found = f"{len(rows)} completions, all {'good' if good else 'bad'}"
            problems.append(Problem(where, found, "good and bad completions", repairs[where]))
    if len({row.prompt_ids.tobytes() for row in _each(data.train)}) == 1:
        found = f"{len(data.train)} completions of one prompt"
        expected = "at least two prompts: KTO's KL estimate pairs prompts with completions of other prompts"
        problems.append(Problem("data.source", found, expected, "add rows with other prompts"))
    if problems:
        raise UserError(problems)


def _each(rows: PreferenceGroups) -> Sequence[Any]:
    return [rows[index] for index in range(len(rows))]


@dataclass(frozen=True)
class KtoTuning:
    """KTO: trains a policy on completions labeled good or bad."""

    job: Job
    text: Text
    data: PreparedPreferences
    policy: Policy
    align: KtoSettings

    @property
    def steps(self) -> int:
        return tuning.optimizer_steps(self.job, len(self.data.train))

    @property
    def samples(self) -> Samples:
        return tuning.samples_of(self.job, self.text, self.data.prompts)

    @cached_property
    def behaviour(self) -> Behaviour:
        return tuning.behaviour_of(self.job, self.text, self.data.prompts)

    def facts(self) -> dict[str, Any]:
        """Run the pre-flight checks and return the metadata of run.json; raises whatever can be refused."""
        self.job.watch(self.behaviour.numbers)
        self.arguments()
        tuning.say_parameters(self.job, self.policy)
        self.preflight()
        return tuning.policy_facts(self.job, self.text, self.policy, self.data.report)

    def preflight(self) -> None:
        """Check rows, model and label balance before step 0; neither data nor model is changed.

        Raises:
            UserError: a check failed.
        """
        job, text, data, policy = self.job, self.text, self.data, self.policy
        with job.timed("preflight"):
            job.check(Tick("environment", job.environment(policy.precision)))
            rows = as_rows(data.train)
            job.check(
                *row_ticks(rows, data.report, text.encoder, max_length=text.max_length, blocks=False),
                vocabulary_tick(policy.model, rows, text.encoder),
                balance_tick(data.train, self.align),
            )
            collate = PaddedCollator(text.encoder.stop_ids[0])
            stored = {"precision": policy.precision, "quantization": policy.quantization}
            job.check(*model_ticks(policy.model, rows, collate, **stored))

    def arguments(self) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: the engine refuses them.
        """
        own = self.align.model_dump() | {"loss_type": "kto"}
        # At least two rows per micro-batch: each is paired with another row's completion to estimate z.
        stage = TrlStage(self.job.recipe.settings.TRL_CONFIG, own, least=2)
        longest = self.data.train.longest
        return tuning.engine_arguments(self.job, self.policy, longest=longest, steps=self.steps, stage=stage)

    def trainer(self) -> MeasuredKTOTrainer:
        """Return TRL's trainer, with the reference computed and checked against the initial policy.

        Raises:
            UserError: policy and reference differ before step 0.
        """
        train, rows = self.job.recipe.settings.train, self.data.train
        order = training_order(
            rows, batch_size=train.batch_size, seed=train.seed, group_by_length=train.group_by_length
        )
        # Log-probabilities of the reference are computed only for rows that the steps use.
        used = order[: self.steps * train.batch_size]
        started = time.monotonic()
        with self.job.timed("reference"):
            trainer = trl_kto_trainer(
                self.policy.model,
                self.arguments(),
                self.text.encoder.tokenizer,
                train=rows,
                held_out=self.data.held_out,
                order=used,
            )
        self.job.say(
            f"reference log-probabilities of {len(used)} completions: {time.monotonic() - started:.1f} s"
        )
        self.job.check(start_tick(trainer, self.align, START[self.policy.precision]))
        return trainer

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Generate greedy completions with the current policy."""
        return tuning.replies(self.job, self.text, self.policy, prompts)

    def measure(self, trainer: Trainer, when: str) -> None:
        """Record the held-out metrics before or after training, and training's first and last metrics.

        Raises:
            NotFiniteError: the held-out loss is NaN or infinite.
        """
        run = self.job.run
        if self.data.held_out is not None and f"held_out_loss_{when}" not in run.record.get("metrics", {}):
            with self.job.timed("held_out"):
                found = trainer.measure()
            if not isfinite(found["loss"]):
                raise NotFiniteError(f"held-out loss is {found['loss']} {when} training")
            run.update(metrics={f"held_out_{name}_{when}": value for name, value in found.items()})
        if when == "after":
            tuning.record_training(self.job, trainer, ("loss", "margin", "kl"))

    def save(self) -> None:
        """Save the adapter (or the model), reload it, and record its checksum.

        Raises:
            UserError: the reloaded weights differ from the trained ones.
        """
        tuning.save_policy(self.job, self.text, self.policy)


def balance_tick(rows: PreferenceGroups, align: KtoSettings) -> Tick:
    """Check the ratio of desirable to undesirable weight, and suggest the paper's if it is out of range."""
    good = int((rows.scores == 1).sum())
    bad = len(rows) - good
    weights = {"desirable_weight": align.desirable_weight, "undesirable_weight": align.undesirable_weight}
    ratio, (low, high) = balance(good, bad, **weights), RATIO
    counted = f"{good} good completions, {bad} bad; weighted {ratio:.2f} to 1"
    if low - 1e-9 <= ratio <= high + 1e-9:
        return Tick("balance", counted)
    if ratio < low:
        advice = f"align.desirable_weight={align.desirable_weight * low / ratio:.3g}"
    else:
        advice = f"align.undesirable_weight={align.undesirable_weight * ratio / high:.3g}"
    return Tick("balance", f"{counted} (recommended: 1 to 1.33): {advice}", warned=True)


@torch.no_grad()
def start_tick(trainer: MeasuredKTOTrainer, align: KtoSettings, tolerance: float) -> Tick:
    """Check that policy equals reference: each completion's loss is half its weight, s(0) = 1/2."""
    rows = [trainer.train_dataset[index] for index in range(trainer.args.per_device_train_batch_size)]
    laid: dict[str, Tensor] = trainer.data_collator(rows)
    batch = {name: value.to(trainer.args.device) for name, value in laid.items()}
    good = laid["label"].numpy()
    expected = float(np.where(good, align.desirable_weight, align.undesirable_weight).mean() / 2)
    with untouched(trainer.model), trainer.accelerator.autocast():
        found = float(trainer.compute_loss(trainer.model, batch))
    detail = f"policy equals reference before step 0: loss {found:.4f}, expected {expected:.4f}"
    if abs(found - expected) <= tolerance:
        return Tick("start", detail)
    problem = Problem(
        "train.engine", f"initial loss {found:.4f}", f"{expected:.4f}: policy equals reference before step 0"
    )
    return failed("start", problem)
