r"""Proximal policy optimization (PPO): maximizes a reward with a KL penalty to the reference policy.

Ouyang et al. 2022 (arXiv 2203.02155), equation 2: maximize E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))] over
completions y sampled from the policy, with the clipped objective of Schulman et al. 2017 (arXiv 1707.06347,
equation 7). Policy, reference, reward and value share one frozen base in memory.

An iteration is a rollout (``align.ppo.experience``: sample a completion per prompt, score it, and compute
advantages per token) and epochs of minibatch updates on it (``align.ppo.trainer``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from align.ppo.rules import RULES as RULES
from align.ppo.settings import Settings

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from align.ppo.actor_critic import PPOModels
    from align.ppo.experience import Rollouts
    from align.ppo.metrics import HeldOutEvaluation
    from align.ppo.pretraining import PretrainingMix
    from align.ppo.trainer import PPOTrainer
    from align.rl.prompts import PreparedPrompts, Prompt
    from finetune.training.context import RunContext
    from finetune.training.findings import Finding
    from finetune.training.generation_eval import GenerationEvals
    from finetune.training.metric_specs import MetricSpec, When
    from finetune.training.model import Policy, TextEncoding
    from finetune.training.stage import Method

PUBLIC = "hh"
"""Default recipe for a base other than the bundled one."""


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, prompts and models.

    Raises:
        UserError: the data are invalid, the base cannot be loaded, or a reward run is missing or damaged.
    """
    from align.ppo.actor_critic import load_ppo_models
    from align.ppo.pretraining import load_pretraining_mix
    from align.rl.prompts import load_prompts
    from finetune.training.generation_eval import GenerationEvals
    from finetune.training.loading import load_text_encoding

    settings, text = ctx.settings, load_text_encoding(ctx)
    prompts = load_prompts(ctx, settings.data, text, max_new_tokens=settings.sampling.max_new_tokens)
    pretraining = load_pretraining_mix(ctx, text)
    models = load_ppo_models(ctx, text, prompts.columns)
    # Loaded here: its graders grade held-out completions during training too.
    evals = GenerationEvals.load(settings, text.encoder, prompts.prompts)
    return PPO(ctx, text, prompts, models, pretraining, evals)


@dataclass(frozen=True)
class PPO:
    """PPO on rewards of the policy's own completions; ``pretraining`` holds the rows of PPO-ptx, if any."""

    ctx: RunContext[Settings]
    text: TextEncoding
    data: PreparedPrompts
    models: PPOModels
    pretraining: PretrainingMix | None
    evals: GenerationEvals

    @property
    def policy(self) -> Policy:
        """Return the trained policy, without the value model."""
        return self.models.policy

    @property
    def metric_spec(self) -> MetricSpec:
        """Return the metrics of the recipe's rewards and graders."""
        from align.ppo.diagnostics import ppo_metric_spec

        return ppo_metric_spec(self.ctx.settings)

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run: rollouts x PPO epochs x minibatches."""
        train, ppo = self.ctx.settings.train, self.ctx.settings.ppo
        num_rollouts = max(1, ceil(train.epochs * len(self.data.train) / ppo.rollout_size))
        return train.max_steps or num_rollouts * ppo.ppo_epochs * (ppo.rollout_size // train.batch_size)

    def prepare(self) -> dict[str, Any]:
        """Check the rewards on the recipe's prompts, before anything is sampled.

        Raises:
            UserError: a reward fails on a prompt.
        """
        from align.ppo.actor_critic import describe_models
        from align.rl.completions import check_rewards
        from align.rl.rewards.loading import rewards_record
        from finetune.training.preflight.checks import CheckResult

        ctx, settings = self.ctx, self.ctx.settings
        for line in describe_models(self.models, settings):
            ctx.log(line)
        ctx.check(
            CheckResult("environment", ctx.describe_environment(self.policy.precision)),
            check_rewards(self.models.rewards, self.data),
        )
        return {"rewards": rewards_record(settings.rewards)}

    def training_arguments(self, num_steps: int) -> TrainingArguments:
        """Return the training arguments, with every ``auto`` resolved.

        Raises:
            UserError: transformers rejects them.
        """
        from finetune.training.arguments import resolve_arguments

        longest = max(self.data.train.lengths) + self.ctx.settings.sampling.max_new_tokens
        # PPO counts its own steps: epochs of the Trainer would count prompts.
        args = resolve_arguments(self.ctx, self.policy, longest=longest, steps=num_steps, max_steps=num_steps)
        self.ctx.resolve_auto("train.max_steps", (num_steps, "optimizer steps of all rollouts"))
        return args

    def build_trainer(self, args: TrainingArguments, num_steps: int) -> PPOTrainer:
        """Return the trainer; the reference is the policy as it is now, before a checkpoint is loaded."""
        from align.ppo.actor_critic import actor_critic_hooks
        from align.ppo.experience import Rollouts
        from align.ppo.metrics import check_initial_ratio, record_rollout
        from align.ppo.state import PPOState
        from align.ppo.stop_rule import RewardHackingStop
        from align.ppo.trainer import PPOTrainer
        from align.preference.reference_policy import ReferencePolicy
        from align.rl.sampling import Sampling
        from finetune.training.trainer import TrainerData

        ctx, settings, models, data = self.ctx, self.ctx.settings, self.models, self.data
        train, encoder = settings.train, self.text.encoder
        rollouts = Rollouts(
            models.actor_critic,
            ReferencePolicy(self.policy.model),
            models.rewards,
            encoder,
            Sampling.from_settings(ctx.hardware.device, settings.sampling, stop_ids=encoder.stop_ids),
            self.policy.precision,
            micro_batch_size=args.per_device_train_batch_size,
        )
        ppo_state = PPOState.initial(settings.ppo)
        trainer = PPOTrainer(
            models.actor_critic,
            args,
            # Rows are prompts: batches are built from the rollout, and nothing is collated.
            TrainerData(data.train, data.held_out, list, train.batch_size, train.group_by_length),
            hooks=actor_critic_hooks(models, settings, steps=num_steps),
            ppo=settings.ppo,
            ppo_state=ppo_state,
            rollouts=rollouts,
            pretraining=self.pretraining,
            held_out=self._held_out_evaluation(rollouts),
            record_rollout=partial(record_rollout, ctx),
            check_initial_ratio=partial(check_initial_ratio, ctx, self.policy.precision),
        )
        trainer.add_callback(RewardHackingStop(ctx, ppo_state))
        return trainer

    def diagnose(self) -> list[Finding]:
        """Return findings on reward, graders, KL, length, diversity and updates."""
        from align.ppo.diagnostics import diagnose_ppo
        from align.rl.rollout_log import equal_rewards_finding
        from finetune.training.held_out_file import reward_change

        run = self.ctx.run
        completions = [(entry["before"], entry["after"]) for entry in run.samples()]
        num_held_out = len(self._held_out_prompts())
        findings = diagnose_ppo(
            run.record["metrics"],
            completions,
            self.ctx.settings.ppo,
            num_held_out=num_held_out,
            reward=reward_change(run),
        )
        equal = equal_rewards_finding(run, self.models.rewards.names)
        # With equal rewards nothing else has a cause of its own.
        return findings if equal is None else [equal, *(f for f in findings if f.name != "reward")]

    def evaluate(self, trainer: PPOTrainer, when: When) -> dict[str, float]:
        """Return the held-out metrics, and write the completions to held_out.jsonl."""
        from finetune.training.held_out_file import write_graded

        if trainer.held_out is None:
            return {}
        return trainer.held_out.evaluate(partial(write_graded, self.ctx.run, "rewards", when))

    def _held_out_evaluation(self, rollouts: Rollouts) -> HeldOutEvaluation | None:
        from align.ppo.metrics import HeldOutEvaluation

        prompts, seed = self._held_out_prompts(), self.ctx.settings.train.seed
        return HeldOutEvaluation(prompts, self.evals.graded.graders, rollouts, seed) if prompts else None

    def _held_out_prompts(self) -> list[Prompt]:
        """Return the held-out prompts of which one completion each is evaluated; empty without."""
        from finetune.training.samples import evenly_spaced

        held_out, count = self.data.held_out, self.ctx.settings.evaluate.grader_rows
        if held_out is None:
            return []
        return [held_out[index] for index in evenly_spaced(len(held_out), count)]
