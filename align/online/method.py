"""RLOO and GRPO as a method: rewards of groups of the policy's own completions, on TRL's trainers."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import TrainingArguments

from align.engines.trl.configs import ONLINE_CONFIGS
from align.engines.trl.online import (
    TRAINERS,
    OnlineTrainer,
    TRLRewardFunction,
    check_trl_reference,
    prompt_order,
)
from align.online.evaluation import HeldOutEvaluation, online_metric_spec
from align.online.settings import GRPOSettings, OnlineSettings, RLOOSettings
from align.preference.reference_policy import ReferencePolicy
from align.reward.shared_base import base_for_scorers, untie_trained_weights
from align.rl.completions import check_rewards
from align.rl.first_completions import check_endings, check_equal_rewards
from align.rl.prompts import PreparedPrompts, load_prompts
from align.rl.rewards.loading import load_rewards, rewards_record
from align.rl.rewards.rewards import Rewards
from align.rl.rewards.settings import LENGTH_PENALTY
from align.rl.rollout_log import Entry, append_rollouts, equal_rewards_finding
from align.rl.sampling import Sampling
from finetune.distributed.collectives import all_gather_object
from finetune.recipe.discovery import adapter_traits
from finetune.training.arguments import num_optimizer_steps, resolve_arguments
from finetune.training.context import RunContext
from finetune.training.findings import Finding
from finetune.training.held_out_file import write_graded
from finetune.training.loading import add_adapter, load_frozen_base, load_text_encoding
from finetune.training.metric_specs import MetricSpec, When
from finetune.training.model import Policy, TextEncoding
from finetune.training.samples import evenly_spaced
from finetune.training.stage import Method, check_policy


@dataclass(frozen=True)
class OnlineRL:
    """RLOO or GRPO; ``loss`` is the stage's own section.

    A step samples ``num_generations`` completions per prompt, compares each with the others of its prompt,
    and trains on them once. With equal rewards in every group of a step all advantages are 0.
    """

    ctx: RunContext[OnlineSettings]
    text: TextEncoding
    data: PreparedPrompts
    policy: Policy
    rewards: Rewards
    loss: RLOOSettings | GRPOSettings

    @property
    def metric_spec(self) -> MetricSpec:
        """Return the metrics of the recipe's rewards."""
        rewards = self.ctx.settings.rewards
        names = [source.metric_name for source in rewards.sources]
        return online_metric_spec(names + ([LENGTH_PENALTY] if rewards.length_penalty else []))

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run; batch sizes count completions."""
        settings = self.ctx.settings
        num_completions = len(self.data.train) * settings.sampling.num_generations
        return num_optimizer_steps(settings.train, num_completions)

    def prepare(self) -> dict[str, Any]:
        """Check the rewards on the recipe's prompts before anything is sampled.

        Raises:
            UserError: a reward fails on a prompt.
        """
        ctx = self.ctx
        check_policy(ctx, self.policy)
        ctx.check(check_rewards(self.rewards, self.data))
        return {"rewards": rewards_record(ctx.settings.rewards)}

    def training_arguments(self, num_steps: int) -> TrainingArguments:
        """Return TRL's config, with every ``auto`` resolved.

        Raises:
            UserError: TRL rejects them.
        """
        settings, sampling = self.ctx.settings, self.ctx.settings.sampling
        fixed_arguments = self.loss.trl_arguments | {
            "temperature": sampling.temperature,
            "max_completion_length": sampling.max_new_tokens,
            "num_generations": sampling.num_generations,
        }
        return resolve_arguments(
            self.ctx,
            self.policy,
            longest=max(self.data.train.lengths) + sampling.max_new_tokens,
            steps=num_steps,
            # The dataset is the prompt order of the complete run: the Trainer's epochs mean nothing here.
            max_steps=num_steps,
            trl_config=ONLINE_CONFIGS[settings.TRL_CONFIG].with_arguments(fixed_arguments),
        )

    def build_trainer(self, args: TrainingArguments, num_steps: int) -> OnlineTrainer:
        """Return TRL's trainer, after checking that its reference equals the initial policy.

        Raises:
            UserError: they differ.
        """
        ctx, settings, prompts = self.ctx, self.ctx.settings, self.data.train
        train, sampling = settings.train, self._sampling_parameters()
        held_out = self._held_out_evaluation(args.per_device_train_batch_size)
        prompts_per_step = train.batch_size // settings.sampling.num_generations
        trainer = TRAINERS[settings.TRL_CONFIG](
            self.policy.model,
            args,
            TRLRewardFunction(self.rewards, prompts, self.text.encoder, self._record_rollout),
            order=prompt_order(
                prompts.lengths,
                count=num_steps * prompts_per_step,
                seed=train.seed,
                group_by_length=train.group_by_length,
                prompts_per_step=prompts_per_step,
            ),
            evaluate_held_out=held_out.evaluate if held_out is not None else None,
        )
        # Without KL TRL keeps no reference.
        if self.loss.beta:
            method, beta_key = settings.adapter.method, f"{self.loss.SECTION}.beta"
            ctx.check(
                check_trl_reference(
                    self.policy, prompts, sampling, seed=train.seed, method=method, beta_key=beta_key
                )
            )
        return trainer

    def evaluate(self, trainer: OnlineTrainer, when: When) -> dict[str, float]:
        """Return the held-out metrics, and write the completions to held_out.jsonl."""
        evaluate = trainer.evaluate_held_out
        return {} if evaluate is None else evaluate(partial(write_graded, self.ctx.run, "rewards", when))

    def diagnose(self) -> list[Finding]:
        """Return a finding if the rewards of all completions are equal."""
        finding = equal_rewards_finding(self.ctx.run, self.rewards.names)
        return [] if finding is None else [finding]

    def _record_rollout(self, local_entries: list[Entry]) -> None:
        """Write a step's completions to rollouts.jsonl; report on the first ones: endings, equal rewards."""
        entries = [entry for entries in all_gather_object(local_entries) for entry in entries]
        append_rollouts(self.ctx.run, entries)
        if entries[0]["step"] == 1:
            ended = [entry["ended_with_eos"] for entry in entries]
            self.ctx.check(
                *check_endings(ended, self.ctx.settings.sampling.max_new_tokens),
                *check_equal_rewards([entry["reward"] for entry in entries], self.rewards.names),
            )

    def _sampling_parameters(self) -> Sampling:
        device, stop_ids = self.ctx.hardware.device, self.text.encoder.stop_ids
        return Sampling.from_settings(device, self.ctx.settings.sampling, stop_ids=stop_ids)

    def _held_out_evaluation(self, micro_batch_size: int) -> HeldOutEvaluation | None:
        """Return the evaluation on held-out prompts; its reference is the policy as it is now."""
        settings, rows = self.ctx.settings, self.data.held_out
        if rows is None:
            return None
        return HeldOutEvaluation(
            [rows[index] for index in evenly_spaced(len(rows), settings.evaluate.grader_rows)],
            self.policy,
            ReferencePolicy(self.policy.model),
            self.rewards,
            self.text.encoder,
            self._sampling_parameters(),
            settings.train.seed,
            micro_batch_size,
        )


def load_online_rl(ctx: RunContext[OnlineSettings], loss: RLOOSettings | GRPOSettings) -> Method:
    """Load tokenizer and prompts, then the base once with the policy's adapter and the reward models on it.

    Args:
        ctx: context of the run.
        loss: the stage's own section, ``rloo`` or ``grpo``.

    Raises:
        UserError: the data are invalid, the base cannot be loaded, the adapter does not fit it, or a reward
            run is missing or damaged.
    """
    settings = ctx.settings
    text = load_text_encoding(ctx)
    prompts = load_prompts(ctx, settings.data, text, max_new_tokens=settings.sampling.max_new_tokens)
    frozen = load_frozen_base(ctx)
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites base weights (PiSSA) must not change the base of the reward models.
    base = base_for_scorers(frozen.base, changes_base=traits.changes_base)
    rewards = load_rewards(
        settings.rewards, base=base, tokenizer=text.encoder.tokenizer, columns=prompts.columns
    )
    for note in rewards.notes:
        ctx.log(note)
    policy = add_adapter(ctx, frozen)
    # Nor may base weights that the policy trains: reward models get copies of them.
    for model in rewards.models:
        untie_trained_weights(model.model, [policy.model])
    return OnlineRL(ctx, text, prompts, policy, rewards, loss)
