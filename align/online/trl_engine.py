"""RLOO and GRPO on TRL's trainers, with our prompts, our rewards, and the initial policy as reference.

TRL keeps a copy of the initial adapter, ``ref``, and switches to it for the reference log-probabilities: the
reference is the initial policy, not the base model. Every step samples its own completions and trains on them
once (on-policy): the ratio of new to old probabilities is 1 and nothing is clipped. No checkpoint falls
between sampling and update, so a resumed run samples what an uninterrupted one would have sampled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from align.online.prompt_numbers import PromptNumbers
from align.preference.trl_engine import COPY, made_quietly, refuse_not_finite
from align.rl.prompts import Prompts
from align.rl.rewards.rewards import Rewards
from data_templates._segments import Message
from finetune.data.batches import optimizer_batches
from finetune.data.tokens import Encoder
from finetune.training.base_trainer import log_held_out

NAMES = {
    "reward": "reward",
    "reward_std": "reward_deviation",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "frac_reward_zero_std": "equal_groups",
}
"""TRL's metric names -> ours."""
CUT, TOKEN_KL = "completions/clipped_ratio", "kl"
"""TRL's metric names: fraction of completions without EOS, and KL in nats per token."""

Measure = Callable[[], dict[str, float]]


class InOurWords(Trainer):  # type: ignore[misc]
    """Renames TRL's metrics to ours; sits between TRL's trainer and Trainer in the MRO."""

    def log(self, logs: dict[str, float | None], start_time: float | None = None) -> None:
        """Log with our metric names; KL in nats per completion; metrics without a value are dropped."""
        known = {NAMES.get(name, name): value for name, value in logs.items() if value is not None}
        if CUT in known:
            known["ends"] = 1 - known[CUT]
        if TOKEN_KL in known:
            # TRL logs it per token; ours is per completion, as in PPO.
            known["kl"] = known[TOKEN_KL] * known["length"]
        super().log(known, start_time)


class Judging:
    """Adapts our rewards to TRL's reward function; remembers the locations of the last batch's prompts."""

    def __init__(self, rewards: Rewards, prompts: Prompts, encoder: Encoder) -> None:
        self.rewards = rewards
        self.prompts = prompts
        self.encoder = encoder
        self.places: list[str] = []

    def reward(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None],
        **ignored: Any,
    ) -> list[float]:
        """Return the reward of each completion; TRL passes more arguments, which are ignored.

        Raises:
            UserError: a reward function failed on a completion.
            NotFiniteError: a reward is NaN or infinite.
        """
        asked = [self.prompts[int(number)] for number in prompts]
        self.places = [prompt.place for prompt in asked]
        replies = [self.encoder.decode_reply(ids) for ids in completion_ids]
        talks = [
            (*prompt.talk, Message("assistant", reply)) for prompt, reply in zip(asked, replies, strict=True)
        ]
        known = [prompt.expected for prompt in asked]
        judged = self.rewards.judge(talks, self.places, expected=known)
        for name, values in judged.parts.items():
            log_metric(part(name), float(values.mean()))
        total: list[float] = judged.total.tolist()
        return total


def part(name: str) -> str:
    """Return the metric name of a single reward in metrics.jsonl."""
    return f"reward_{name}"


class MeasuredRLOOTrainer(RLOOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's trainer with our held-out evaluation; a NaN loss names its rows."""

    judging: Judging
    held_out: Measure

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; raise NotFiniteError if the loss is NaN or infinite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        refuse_not_finite(self, loss, self.judging.places)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics."""
        return log_held_out(self, self.held_out())


class MeasuredGRPOTrainer(GRPOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's trainer with our held-out evaluation; a NaN loss names its rows."""

    judging: Judging
    held_out: Measure

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; raise NotFiniteError if the loss is NaN or infinite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        refuse_not_finite(self, loss, self.judging.places)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics."""
        return log_held_out(self, self.held_out())


OnlineTrainer = MeasuredRLOOTrainer | MeasuredGRPOTrainer
TRAINERS: Mapping[str, type[OnlineTrainer]] = {
    "RLOOConfig": MeasuredRLOOTrainer,
    "GRPOConfig": MeasuredGRPOTrainer,
}
"""Class name of the arguments -> trainer."""


def prompt_order(
    lengths: Sequence[int], *, count: int, seed: int, group_by_length: bool, together: int
) -> list[int]:
    """Return the prompt order of the run: reshuffled per epoch, ``prompts_per_step`` at a time."""
    # TRL's own shuffle depends on a random state that is in no checkpoint; a fixed order resumes exactly.
    order: list[int] = []
    epoch = 0
    while len(order) < count:
        batches = optimizer_batches(
            lengths, together, seed=seed, epoch=epoch, group_by_length=group_by_length
        )
        order += [row for batch in batches for row in batch]
        epoch += 1
    return order[:count]


def online_trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    judging: Judging,
    *,
    order: Sequence[int],
    held_out: Measure | None,
) -> OnlineTrainer:
    """Return TRL's trainer; its reference is the model as it is now.

    Args:
        model: base with adapter, before its first step.
        args: RLOOConfig or GRPOConfig.
        reward_function: our rewards and prompts, as TRL calls them.
        order: prompt indices of the complete run.
        evaluate_held_out: evaluation between steps, or None.
    """
    encoder = judging.encoder
    end = int(encoder.tokenizer.eos_token_id)
    numbers = PromptNumbers(encoder.tokenizer, [prompt.ids for prompt in judging.prompts], end=end)
    asked = Dataset.from_dict({"prompt": [str(number) for number in order]})
    with made_quietly(), _ends(model, encoder.stop_ids), _as_stored(model):
        trainer = TRAINERS[type(args).__name__](
            model=model,
            reward_funcs=judging.reward,
            args=args,
            train_dataset=asked,
            # A placeholder: TRL needs a dataset to evaluate on, and our evaluate() has its own prompts.
            eval_dataset=None if held_out is None else asked.select([0]),
            processing_class=numbers,
        )
    for name, weight in model.named_parameters():
        if f".{COPY}." in name:
            weight.requires_grad_(False)  # for virtual tokens PEFT leaves the copy trainable
    trainer.judging = judging
    if held_out is not None:
        trainer.held_out = held_out
    return trainer


@contextmanager
def _ends(model: PreTrainedModel, stop_ids: Sequence[int]) -> Iterator[None]:
    """Set the model's EOS ids to our stop tokens while TRL's trainer reads them."""
    config = model.generation_config
    before = config.eos_token_id
    config.eos_token_id = list(stop_ids)
    try:
        yield
    finally:
        config.eos_token_id = before


@contextmanager
def _as_stored(model: nn.Module) -> Iterator[None]:
    """Restore the trained weights afterwards: on a 4-bit base TRL casts them to bfloat16."""
    before = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in before:
            weight.data = before[name]


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Turn the policy into TRL's reference, as TRL does: by activating its copy of the adapter."""
    assert isinstance(model, PeftModel) and COPY in model.peft_config
    active = model.active_adapter
    model.set_adapter(COPY)
    try:
        yield
    finally:
        model.set_adapter(active)
