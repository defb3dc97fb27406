"""PPO trainer: rollouts, minibatch updates with PPO clip, metrics; a subclass of transformers' Trainer."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from align.ppo import experience, metrics
from align.ppo.experience import Rollouts
from align.ppo.pretraining import PRETRAINING_BATCH, PretrainingMix
from align.ppo.rollout import Rollout
from align.ppo.settings import PPOSettings
from align.ppo.state import PPOState
from align.rl.completions import ScoredCompletions, completion_metrics, kl_metrics
from align.rl.maths.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from align.rl.prompts import Prompt, Prompts
from finetune.distributed.collectives import all_gather_object, shard
from finetune.distributed.rank import dist_info
from finetune.training.base_trainer import BaseTrainer, log_held_out
from finetune.training.metrics import EVAL_PREFIX

EVAL_ROLLOUT_INDEX = -1
"""Rollout index of the held-out completions: always the same seed, and no rollout's."""


class PPOTrainer(BaseTrainer):
    """Trains the policy on its own completions. A row is a prompt; batch sizes count completions."""

    ppo: PPOSettings
    rollouts: Rollouts
    ppo_state: PPOState
    held_out_prompts: Sequence[Prompt] = ()
    grader_metrics: Callable[[ScoredCompletions], dict[str, float]] | None = None
    pretraining: PretrainingMix | None = None
    check_initial_ratio: Callable[[float], None] | None = None

    @cached_property
    def token_metrics(self) -> metrics.TokenMetricAverager:
        """Return the averager of per-token metrics, emptied whenever they are logged."""
        return metrics.TokenMetricAverager()

    @property
    def prompts(self) -> Prompts:
        """Return the training prompts."""
        assert isinstance(self.train_dataset, Prompts)
        return self.train_dataset

    @property
    def rollout(self) -> Rollout:
        """Return the current rollout."""
        assert self.ppo_state.rollout is not None, "no rollout was sampled"
        return self.ppo_state.rollout

    @property
    def minibatches(self) -> list[list[list[int]]]:
        """Return the minibatches of all PPO epochs on the current rollout, as micro-batches of indices."""
        # Derived from lengths and seed each time, so that a checkpoint need not store it.
        prompt_lengths = [len(prompt) for prompt in self.rollout.prompts]
        return self._make_minibatches(
            [p + c for p, c in zip(prompt_lengths, self.rollout.lengths, strict=True)], self.rollout_index
        )

    @property
    def rollout_index(self) -> int:
        """Return the index of the current rollout, from 0."""
        return self.ppo_state.num_rollouts - 1

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader of micro-batch indices; ``get_batch_samples`` builds the batches."""
        # The Trainer asks for a loader up front, and a rollout exists only once the policy has sampled it.
        num_micro_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(list(range(num_micro_batches)), batch_size=1, collate_fn=_first_item)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step and its number of tokens; sample a rollout if due."""
        # The loader only counts: transformers ends the epoch when its iterator does.
        for _ in range(num_batches):
            next(epoch_iterator)
        if self._rollout_consumed():
            self.collect_rollout()
        minibatch = self.minibatches[self.ppo_state.minibatches_done]
        # Counted before the update: a checkpoint is saved after the step, when this minibatch is done.
        self.ppo_state.minibatches_done, self.ppo_state.approx_kl = self.ppo_state.minibatches_done + 1, 0.0
        batches = self._micro_batches(minibatch, num_batches)
        if self.pretraining:
            self.pretraining.add_to_batches(batches, step=self.state.global_step, dist=dist_info())
        num_tokens = torch.tensor(sum(int(batch["mask"].sum()) for batch in batches), device=device)
        self.num_tokens += int(num_tokens)
        return batches, self.accelerator.reduce(num_tokens, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's part of the mean loss over all tokens of the optimizer step."""
        assert num_items_in_batch is not None and not return_outputs
        ppo, mask_CT = self.ppo, inputs["mask"]
        outputs = model(
            inputs, with_entropy=ppo.entropy_coef > 0, pretraining_batch=inputs.get(PRETRAINING_BATCH)
        )
        policy = policy_loss(
            outputs.logps, inputs["old_logps"], inputs["advantages"], mask_CT, clip_range=ppo.clip_range
        )
        value = value_loss(
            outputs.values, inputs["old_values"], inputs["returns"], mask_CT, clip_range=ppo.value_clip_range
        )
        # One sum, so that policy and value model share a backward pass and an optimizer step.
        losses_CT = policy.losses + ppo.value_coef * value.losses
        losses_CT = losses_CT - ppo.entropy_coef * outputs.entropies.masked_fill(~mask_CT, 0.0)
        self._record_metrics(inputs, outputs.logps, policy, value, num_tokens=num_items_in_batch)
        # Divided by the tokens of the whole step: the loss does not depend on how a step is split into
        # micro-batches and ranks.
        loss_sum = losses_CT.sum()
        if self.hooks.penalty:  # weighted by this micro-batch's part of the step's tokens
            loss_sum = loss_sum + self.hooks.penalty() * mask_CT.sum()
        loss: Tensor = loss_sum / num_items_in_batch
        if self.pretraining:
            loss = loss + self.pretraining.loss(outputs.pretraining_nll, inputs)
        # DDP averages gradients over ranks: undo that division, the mean above is global already.
        loss = loss * self.accelerator.num_processes
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass, and add its duration to ``seconds["updates"]``."""
        with self.rollouts.timed("updates"):
            return super().training_step(model, inputs, num_items_in_batch)

    def collect_rollout(self) -> None:
        """Sample and score a rollout, and compute its advantages and returns.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        ppo_state, rollouts, ppo, seed = self.ppo_state, self.rollouts, self.ppo, self.args.seed
        rollout_index = ppo_state.num_rollouts
        prompt_indices = experience.rollout_prompt_indices(
            len(self.prompts), ppo.rollout_size, rollout_index, seed=seed
        )
        completions = rollouts.generate_and_score(
            experience.select_prompts(self.prompts, prompt_indices), seed=_sampling_seed(seed, rollout_index)
        )
        # Before this rollout is normalized: the statistics are empty at the first one.
        ppo_state.reward_stats = ppo_state.reward_stats.updated(completions.rewards)
        minibatches = self._make_minibatches(experience.total_lengths(completions).tolist(), rollout_index)
        minibatches_per_epoch = ppo.rollout_size // self.batch_size
        # In the layout of the first epoch: same shapes, same rounding, so its first ratios are exactly 1.
        stats = rollouts.score_tokens(
            completions,
            [indices for minibatch in minibatches[:minibatches_per_epoch] for indices in minibatch],
        )
        rewards = experience.shape_rewards(completions, ppo, ppo_state.reward_stats)
        kl_coef = ppo_state.kl_controller.kl_coef
        tensors = experience.advantages_and_returns(
            stats, rewards, completions.lengths, kl_coef=kl_coef, settings=ppo
        )
        ppo_state.rollout = experience.build_rollout(prompt_indices, completions, tensors)
        rollout_metrics = completion_metrics(completions) | kl_metrics(completions, stats)
        rollout_metrics |= metrics.value_metrics(stats.values, tensors.returns, completions.lengths)
        rollout_metrics |= {"objective/shaped_reward": float(rewards.mean()), "objective/kl_coef": kl_coef}
        rollout_metrics |= {f"time/{work}": value for work, value in rollouts.seconds.items()}
        rollouts.seconds.clear()
        # After the advantages: this rollout uses the old coefficient.
        ppo_state.kl_controller = ppo_state.kl_controller.updated(
            rollout_metrics["objective/kl_per_completion"], len(prompt_indices)
        )
        # The first rollout stays the baseline of the stop rules.
        ppo_state.pending_metrics, ppo_state.first_metrics = (
            rollout_metrics,
            ppo_state.first_metrics or rollout_metrics,
        )
        ppo_state.num_rollouts, ppo_state.minibatches_done, ppo_state.approx_kl = rollout_index + 1, 0, 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's metrics, the means of the per-token metrics, and those of a new rollout."""
        # The Trainer also logs evaluation and the summary of the run, which have no per-token metrics.
        if "loss" in logs:
            logs |= (
                metrics.mean_over_tokens(all_gather_object(self.token_metrics.take()))
                | self.ppo_state.pending_metrics
            )
            self.ppo_state.pending_metrics = {}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the metrics of completions to held-out prompts."""
        return log_held_out(
            self, {f"{EVAL_PREFIX}{name}": value for name, value in self.held_out_metrics().items()}
        )

    def held_out_metrics(self) -> dict[str, float]:
        """Return the metrics of completions to held-out prompts, always sampled with the same seed.

        Raises:
            UserError: a reward function or a grader raised or did not return a number.
        """
        rollout_seconds = dict(self.rollouts.seconds)
        completions = self.rollouts.generate_and_score(
            self.held_out_prompts, seed=_sampling_seed(self.args.seed, EVAL_ROLLOUT_INDEX)
        )
        stats = self.rollouts.score_tokens(completions, self.rollouts.micro_batches(completions))
        self.rollouts.seconds = rollout_seconds  # evaluation is not part of a rollout's time
        grader_metrics = self.grader_metrics(completions) if self.grader_metrics else {}
        return completion_metrics(completions) | kl_metrics(completions, stats) | grader_metrics

    def _micro_batches(self, minibatch: list[list[int]], count: int) -> list[dict[str, Any]]:
        """Return this process's micro-batches of an optimizer step, padded to ``count`` with empty ones."""
        pad_id = self.rollouts.sampling.stop_ids[0]
        micro_batches: list[dict[str, Any]] = [
            dict(self.rollout.batch(indices, pad_id=pad_id)) for indices in shard(minibatch)
        ]
        for _ in range(count - len(micro_batches)):
            # Every rank must run the same number of forward passes, or collectives hang: mask one out.
            batch = self.rollout.batch(minibatch[-1][-1:], pad_id=pad_id)
            empty = {"rows": batch["rows"][:0], "mask": torch.zeros_like(batch["mask"])}
            micro_batches.append({**batch, **empty})
        return micro_batches

    def _make_minibatches(self, total_lengths: Sequence[int], rollout_index: int) -> list[list[list[int]]]:
        """Return the minibatches of all PPO epochs on a rollout, each as micro-batches of indices."""
        micro_batch_size = self.args.per_device_train_batch_size
        return [
            minibatch
            for epoch in range(self.ppo.ppo_epochs)
            for minibatch in experience.make_minibatches(
                total_lengths,
                batch_size=self.batch_size,
                micro_batch_size=micro_batch_size,
                seeds=[self.args.seed, rollout_index, epoch],
            )
        ]

    def _rollout_consumed(self) -> bool:
        """Return whether a new rollout is due: all minibatches are done, or approx_kl exceeds its target."""
        if self.ppo_state.rollout is None or self.ppo_state.minibatches_done == len(self.minibatches):
            return True
        target_kl = self.ppo.target_kl
        return target_kl is not None and self.ppo_state.approx_kl > target_kl

    def _record_metrics(
        self,
        inputs: dict[str, Any],
        logps_CT: Tensor,
        policy: PolicyLoss,
        value: ValueLoss,
        *,
        num_tokens: Tensor | int,
    ) -> None:
        """Record the metrics of a micro-batch, and check that a rollout's first ratios are 1."""
        mask_CT = inputs["mask"]
        approx_kl_CT = metrics.approx_kl(inputs["old_logps"], logps_CT, mask_CT)
        # Adds up over micro-batches and ranks to the mean over the tokens of the step.
        self.ppo_state.approx_kl += float(self.accelerator.reduce(approx_kl_CT.sum() / num_tokens, "sum"))
        per_token = {
            "loss/policy": policy.losses,
            "loss/value": value.losses,
            "policy/ratio": policy.ratios,
            "policy/clip_frac": policy.clipped.float(),
            "policy/approx_kl": approx_kl_CT,
        }
        self.token_metrics.add(per_token, mask_CT)
        # Only in the first minibatch of a rollout: after its update the ratios are no longer 1.
        if self.ppo_state.minibatches_done == 1 and self.check_initial_ratio:
            self.check_initial_ratio(max(all_gather_object(float((policy.ratios - 1).abs().max()))))


def _first_item(items: list[int]) -> int:
    return items[0]


def _sampling_seed(seed: int, rollout_index: int) -> int:
    """Return the sampling seed of a rollout; index -1 is evaluation."""
    # A large prime: runs with neighboring seeds share no rollout seed.
    return seed * 1_000_003 + rollout_index + 1
