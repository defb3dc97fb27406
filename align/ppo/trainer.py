"""PPO trainer: an iteration is a rollout and epochs of clipped minibatch updates on it.

transformers' Trainer runs the loop. It asks for the micro-batches of an optimizer step
(``get_batch_samples``), for which a rollout is sampled when the last one is consumed (``collect_rollout``),
and for the loss of each (``compute_loss``).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from align.ppo import metrics
from align.ppo.actor_critic import ActorCritic
from align.ppo.experience import Rollout, Rollouts, advantages_and_returns, shape_rewards, total_lengths
from align.ppo.pretraining import PRETRAINING_BATCH, PretrainingMix
from align.ppo.rollout_order import rollout_minibatches, rollout_prompt_indices, sampling_seed
from align.ppo.settings import PPOSettings
from align.ppo.state import PPOState, PPOStateCallback
from align.rl.completions import ScoredCompletions, completion_metrics, kl_metrics
from align.rl.maths.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from finetune.adapters.traits import Hooks
from finetune.distributed.collectives import all_gather_object, shard
from finetune.distributed.rank import dist_info
from finetune.training.trainer import BaseTrainer, TrainerData


class PPOTrainer(BaseTrainer):
    """Trains the policy on its own completions. A row is a prompt; batch sizes count completions."""

    def __init__(
        self,
        model: ActorCritic,
        args: TrainingArguments,
        data: TrainerData,
        *,
        hooks: Hooks,
        ppo: PPOSettings,
        ppo_state: PPOState,
        rollouts: Rollouts,
        pretraining: PretrainingMix | None,
        held_out: metrics.HeldOutEvaluation | None,
        record_rollout: Callable[[int, ScoredCompletions, Tensor], None],
        check_initial_ratio: Callable[[float], None],
    ) -> None:
        """Set up the trainer.

        Args:
            model: policy and value model.
            args: with ``max_steps``; epochs would count prompts.
            data: the prompts.
            hooks: learning rate factors, and the adapter's callbacks during training.
            ppo: hyperparameters.
            ppo_state: KL coefficient, reward statistics and current rollout; checkpoints hold it.
            rollouts: samples and scores completions.
            pretraining: rows of PPO-ptx, if any.
            held_out: evaluates on held-out prompts, if there are any.
            record_rollout: receives the next step, the completions of a rollout, their shaped rewards (C,).
            check_initial_ratio: receives the largest difference from 1 of a rollout's first ratios.
        """
        super().__init__(model, args, data, hooks=hooks)
        self.prompts = data.train
        self.ppo, self.ppo_state, self.rollouts = ppo, ppo_state, rollouts
        self.pretraining, self.held_out = pretraining, held_out
        self.record_rollout, self.check_initial_ratio = record_rollout, check_initial_ratio
        # Emptied whenever they are logged.
        self.token_metrics = metrics.TokenMetricAverager()
        # Before the recorder, which writes the checksums of a checkpoint's files.
        self.add_callback(PPOStateCallback(ppo_state))

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader of micro-batch indices; ``get_batch_samples`` builds the batches."""
        # The Trainer asks for a loader up front, and a rollout exists only once the policy has sampled it.
        num_micro_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(range(num_micro_batches), batch_size=1, collate_fn=_first_item)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step and its number of tokens; sample a rollout if due."""
        # The loader only counts: transformers ends the epoch when its iterator does.
        for _ in range(num_batches):
            next(epoch_iterator)
        if self._rollout_consumed():
            self.collect_rollout()
        minibatch = self._current_minibatches()[self.ppo_state.minibatches_done]
        # Counted before the update: a checkpoint is saved after the step, when this minibatch is done.
        self.ppo_state.minibatches_done, self.ppo_state.approx_kl = self.ppo_state.minibatches_done + 1, 0.0
        batches = self._micro_batches(minibatch, num_batches)
        if self.pretraining:
            self.pretraining.add_to_batches(batches, step=self.state.global_step, dist=dist_info())
        num_tokens = torch.tensor(sum(int(batch["mask"].sum()) for batch in batches), device=device)
        self.num_tokens += int(num_tokens)
        return batches, self.accelerator.reduce(num_tokens, "sum")

    def collect_rollout(self) -> None:
        """Sample and score a rollout, and compute its advantages and returns.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        state, rollouts, ppo, seed = self.ppo_state, self.rollouts, self.ppo, self.args.seed
        index = state.num_rollouts
        prompt_indices = rollout_prompt_indices(len(self.prompts), ppo.rollout_size, index, seed=seed)
        completions = rollouts.generate_and_score(
            [self.prompts[prompt_index] for prompt_index in prompt_indices], seed=sampling_seed(seed, index)
        )
        # Before this rollout is normalized: the statistics are empty at the first one.
        state.reward_stats = state.reward_stats.updated(completions.rewards)
        minibatches = self._make_minibatches(total_lengths(completions), index)
        first_epoch = minibatches[: ppo.rollout_size // self.batch_size]
        # In the layout of the first epoch: same shapes, same rounding, so its first ratios are exactly 1.
        stats = rollouts.score_tokens(
            completions, [indices for minibatch in first_epoch for indices in minibatch]
        )
        rewards_C = shape_rewards(completions, ppo, state.reward_stats)
        self.record_rollout(self.state.global_step + 1, completions, rewards_C)
        kl_coef = state.kl_controller.kl_coef
        tensors = advantages_and_returns(stats, rewards_C, completions.lengths, kl_coef=kl_coef, settings=ppo)
        rollout_metrics = completion_metrics(completions) | kl_metrics(completions, stats)
        rollout_metrics |= metrics.value_metrics(stats.values, tensors.returns, completions.lengths)
        rollout_metrics |= {"objective/shaped_reward": float(rewards_C.mean()), "objective/kl_coef": kl_coef}
        rollout_metrics |= {f"time/{work}": value for work, value in rollouts.seconds.items()}
        rollouts.seconds.clear()
        state.begin_updates(Rollout.build(prompt_indices, completions, tensors), rollout_metrics)

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

    def held_out_metrics(self) -> dict[str, float]:
        """Return the metrics of completions to held-out prompts."""
        assert self.held_out is not None, "evaluate_every is set with held-out prompts only"
        return self.held_out.evaluate()

    def _micro_batches(self, minibatch: list[list[int]], count: int) -> list[dict[str, Any]]:
        """Return this process's micro-batches of an optimizer step, padded to ``count`` with empty ones."""
        rollout, pad_id = self._current_rollout(), self.rollouts.sampling.stop_ids[0]
        micro_batches: list[dict[str, Any]] = [
            dict(rollout.batch(indices, pad_id=pad_id)) for indices in shard(minibatch)
        ]
        for _ in range(count - len(micro_batches)):
            # Every rank must run the same number of forward passes, or collectives hang: mask one out.
            batch = rollout.batch(minibatch[-1][-1:], pad_id=pad_id)
            empty = {"row_ids": batch["row_ids"][:0], "mask": torch.zeros_like(batch["mask"])}
            micro_batches.append({**batch, **empty})
        return micro_batches

    def _make_minibatches(self, lengths: Sequence[int], rollout_index: int) -> list[list[list[int]]]:
        """Return the minibatches of all PPO epochs on a rollout, each as micro-batches of indices."""
        return rollout_minibatches(
            lengths,
            rollout_index,
            num_epochs=self.ppo.ppo_epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
        )

    def _current_rollout(self) -> Rollout:
        assert self.ppo_state.rollout is not None, "no rollout was sampled"
        return self.ppo_state.rollout

    def _current_minibatches(self) -> list[list[list[int]]]:
        # Derived from lengths and seed each time, so that a checkpoint need not store it.
        return self._make_minibatches(self._current_rollout().total_lengths, self.ppo_state.num_rollouts - 1)

    def _rollout_consumed(self) -> bool:
        """Return whether a new rollout is due: all minibatches are done, or approx_kl exceeds its target."""
        state, target_kl = self.ppo_state, self.ppo.target_kl
        if state.rollout is None or state.minibatches_done == len(self._current_minibatches()):
            return True
        return target_kl is not None and state.approx_kl > target_kl

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
        if self.ppo_state.minibatches_done == 1:
            self.check_initial_ratio(max(all_gather_object(float((policy.ratios - 1).abs().max()))))


def _first_item(items: list[int]) -> int:
    return items[0]
