"""PPO trainer: rollouts, minibatch updates with PPO clip, metrics; a subclass of transformers' Trainer."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from align.ppo import experience, measures
from align.ppo.episodes import Episodes
from align.ppo.experience import Collector
from align.ppo.pretraining import ROWS, Pretraining
from align.ppo.progress import Progress
from align.ppo.settings import PpoSettings
from align.rl.maths.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from align.rl.measures import of_distance, of_replies
from align.rl.prompts import Prompt, Prompts
from align.rl.replies import Replies
from finetune.planning.world import world
from finetune.training.base_trainer import BaseTrainer, log_held_out
from finetune.training.processes import everyones, share

HELD_OUT = "held_out_"
AT_HELD_OUT = -1
"""Rollout index of the held-out completions: always the same seed, and no rollout's."""


class PpoTrainer(BaseTrainer):
    """Trains on its own completions. A row is a prompt; batch sizes count completions."""

    ppo: PpoSettings
    collector: Collector
    progress: Progress
    held_out: Sequence[Prompt] = ()
    gold: Callable[[Replies], dict[str, float]] | None = None
    pretraining: Pretraining | None = None
    begins_at_one: Callable[[float], None] | None = None

    @cached_property
    def means(self) -> measures.TokenMeans:
        """Return the per-token metrics since they were last logged."""
        return measures.TokenMeans()

    @property
    def prompts(self) -> Prompts:
        """Return the training prompts."""
        assert isinstance(self.train_dataset, Prompts)
        return self.train_dataset

    @property
    def episodes(self) -> Episodes:
        """Return the current rollout."""
        assert self.progress.episodes is not None, "no rollout was sampled"
        return self.progress.episodes

    @property
    def updates(self) -> list[list[list[int]]]:
        """Return the minibatches of all PPO epochs on the current rollout, as micro-batches of indices."""
        # Derived from lengths and seed each time, so that a checkpoint need not store it.
        lengths = [len(prompt) for prompt in self.episodes.prompts]
        return self._cut([p + c for p, c in zip(lengths, self.episodes.lengths, strict=True)], self.rollout)

    @property
    def rollout(self) -> int:
        """Return the index of the current rollout, from 0."""
        return self.progress.rollouts - 1

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader of micro-batch indices; ``get_batch_samples`` builds the batches."""
        # The Trainer asks for a loader up front, and a rollout exists only once the policy has sampled it.
        passes = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(list(range(passes)), batch_size=1, collate_fn=_only)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step and its number of tokens; sample a rollout if due."""
        # The loader only counts: transformers ends the epoch when its iterator does.
        for _ in range(num_batches):
            next(epoch_iterator)
        if self._learnt_out():
            self.collect()
        step = self.updates[self.progress.done]
        self.progress.done, self.progress.step_kl = self.progress.done + 1, 0.0
        batches = self._passes(step, num_batches)
        if self.pretraining:
            self.pretraining.add_to(batches, step=self.state.global_step, world=world())
        tokens = torch.tensor(sum(int(batch["mask"].sum()) for batch in batches), device=device)
        self.num_tokens += int(tokens)
        return batches, self.accelerator.reduce(tokens, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's part of the mean loss over all tokens of the optimizer step."""
        assert num_items_in_batch is not None and not return_outputs
        ppo, mask = self.ppo, inputs["mask"]
        found = model(inputs, spread=ppo.entropy_coefficient > 0, beside=inputs.get(ROWS))
        policy = policy_loss(found.logps, inputs["old_logps"], inputs["advantages"], mask, clip=ppo.clip)
        value = value_loss(found.values, inputs["old_values"], inputs["returns"], mask, clip=ppo.value_clip)
        # One sum, so that policy and value model share a backward pass and an optimizer step.
        losses = policy.losses + ppo.value_coefficient * value.losses
        losses = losses - ppo.entropy_coefficient * found.entropies.masked_fill(~mask, 0.0)
        self._watch(inputs, found.logps, policy, value, tokens=num_items_in_batch)
        # Divided by the tokens of the whole step below: the loss does not depend on how a step is split into
        # micro-batches and ranks.
        loss_sum = losses.sum()
        if self.hooks.penalty:  # weighted by this micro-batch's part of the step's tokens
            loss_sum = loss_sum + self.hooks.penalty() * mask.sum()
        loss: Tensor = loss_sum / num_items_in_batch
        if self.pretraining:
            loss = loss + self.pretraining.loss(found.unlikelihood, inputs)
        # DDP averages gradients over ranks, and the mean above is global already.
        loss = loss * self.accelerator.num_processes
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass, and add its duration to ``updates``."""
        with self.collector.timed("updates"):
            return super().training_step(model, inputs, num_items_in_batch)

    def collect(self) -> None:
        """Sample and score a rollout, and compute its advantages and returns.

        Raises:
            UserError: a reward function raised or did not return a number.
        """
        progress, collector, ppo, seed = self.progress, self.collector, self.ppo, self.args.seed
        number = progress.rollouts
        rows = experience.rows_of_rollout(len(self.prompts), ppo.rollout_size, number, seed=seed)
        replies = collector.answer(experience.select(self.prompts, rows), seed=_seed(seed, number))
        # Updated before this rollout is normalized: the first one would not be scaled otherwise.
        progress.running = progress.running.updated(replies.rewards)
        first_epoch = self._cut(experience.whole_lengths(replies).tolist(), number)
        per_epoch = ppo.rollout_size // self.batch_size
        # In the layout of the first epoch: same shapes, same rounding, so its first ratios are exactly 1.
        said = collector.read(replies, [part for step in first_epoch[:per_epoch] for part in step])
        scores = experience.shaped_scores(replies, ppo, progress.running)
        coefficient = progress.controller.coefficient
        tables = experience.learnt_from(said, scores, replies.lengths, coefficient=coefficient, settings=ppo)
        progress.episodes = experience.episodes_of(rows, replies, tables)
        found = of_replies(replies) | of_distance(replies, said)
        found |= measures.of_values(said.values, tables.returns, replies.lengths)
        found |= {"score": float(scores.mean()), "kl_coefficient": coefficient}
        found |= {f"seconds_{work}": value for work, value in collector.seconds.items()}
        collector.seconds.clear()
        # After the advantages: this rollout was penalized with the coefficient before.
        progress.controller = progress.controller.after(found["kl"], len(rows))
        # The first rollout stays the baseline of the stop rules.
        progress.pending, progress.first = found, progress.first or found
        progress.rollouts, progress.done, progress.step_kl = number + 1, 0, 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's metrics, the means of the per-token metrics, and those of a new rollout."""
        # The Trainer also logs evaluation and the summary of the run, which have no per-token metrics.
        if "loss" in logs:
            logs |= measures.means_of(everyones(self.means.take())) | self.progress.pending
            self.progress.pending = {}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the metrics of completions to held-out prompts."""
        return log_held_out(self, {f"{HELD_OUT}{name}": value for name, value in self.measure().items()})

    def measure(self) -> dict[str, float]:
        """Return the metrics of completions to held-out prompts, always sampled with the same seed.

        Raises:
            UserError: a reward function or a grader raised or did not return a number.
        """
        before = dict(self.collector.seconds)
        replies = self.collector.answer(self.held_out, seed=_seed(self.args.seed, AT_HELD_OUT))
        said = self.collector.read(replies, self.collector.passes(replies))
        self.collector.seconds = before  # evaluation is not part of a rollout's time
        gold = self.gold(replies) if self.gold else {}
        return of_replies(replies) | of_distance(replies, said) | gold

    def _passes(self, step: list[list[int]], count: int) -> list[dict[str, Any]]:
        """Return this process's micro-batches of an optimizer step, padded to ``count`` with empty ones."""
        pad = self.collector.sampling.stop_ids[0]
        passes: list[dict[str, Any]] = [dict(self.episodes.batch(part, pad_id=pad)) for part in share(step)]
        for _ in range(count - len(passes)):
            # Every rank must run the same number of forward passes, or collectives hang: mask one out.
            batch = self.episodes.batch(step[-1][-1:], pad_id=pad)
            nothing = {"rows": batch["rows"][:0], "mask": torch.zeros_like(batch["mask"])}
            passes.append({**batch, **nothing})
        return passes

    def _cut(self, lengths: Sequence[int], rollout: int) -> list[list[list[int]]]:
        """Return the minibatches of all PPO epochs on a rollout, each as micro-batches of indices."""
        size = self.args.per_device_train_batch_size
        return [
            step
            for epoch in range(self.ppo.epochs)
            for step in experience.cut_updates(
                lengths, batch_size=self.batch_size, size=size, draw=[self.args.seed, rollout, epoch]
            )
        ]

    def _learnt_out(self) -> bool:
        """Return whether a new rollout is due: all minibatches are done, or approx_kl exceeds its target."""
        if self.progress.episodes is None or self.progress.done == len(self.updates):
            return True
        most = self.ppo.epoch_stop_kl
        return most is not None and self.progress.step_kl > most

    def _watch(
        self,
        inputs: dict[str, Any],
        logps: Tensor,
        policy: PolicyLoss,
        value: ValueLoss,
        *,
        tokens: Tensor | int,
    ) -> None:
        """Record the metrics of a micro-batch, and check that a rollout's first ratios are 1."""
        mask = inputs["mask"]
        step_kl = measures.from_sampler(inputs["old_logps"], logps, mask)
        # Adds up over micro-batches and ranks to the mean over the tokens of the step.
        self.progress.step_kl += float(self.accelerator.reduce(step_kl.sum() / tokens, "sum"))
        tables = {
            "policy_loss": policy.losses,
            "value_loss": value.losses,
            "ratio": policy.ratios,
            "clipped": policy.clipped.float(),
            "step_kl": step_kl,
        }
        self.means.add(tables, mask)
        # Only in the first minibatch of a rollout: after its update the ratios are no longer 1.
        if self.progress.done == 1 and self.begins_at_one:
            self.begins_at_one(max(everyones(float((policy.ratios - 1).abs().max()))))


def _only(items: list[int]) -> int:
    return items[0]


def _seed(seed: int, rollout: int) -> int:
    """Return the sampling seed of a rollout; index -1 is evaluation."""
    # A large prime: runs with neighboring seeds share no rollout seed.
    return seed * 1_000_003 + rollout + 1
