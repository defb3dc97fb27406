"""RLOO and GRPO on TRL's trainers, with our prompts, our rewards, and the initial policy as reference.

TRL keeps a copy of the initial adapter, ``ref``, and switches to it for the reference log-probabilities: the
reference is the initial policy, not the base model. Every step samples its own completions and trains on them
once (on-policy): the ratio of new to old probabilities is 1 and nothing is clipped. No checkpoint falls
between sampling and update, so a resumed run samples what an uninterrupted one would have sampled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOTrainer, RLOOTrainer

from align.engines.trl.preference import REFERENCE_ADAPTER, ROUNDING_TOLERANCE, progress_bars_disabled
from align.online.evaluation import score_tokens
from align.rl.completions import KeepGraded
from align.rl.first_completions import ends_with_stop_token
from align.rl.prompts import Prompt, Prompts
from align.rl.rewards.rewards import Rewards
from align.rl.rollout_log import Entry, rollout_entries
from align.rl.sampling import Sampling, sample_completions
from data_templates.segments import Message
from finetune.data.batches import optimizer_batches
from finetune.data.tokens import Encoder
from finetune.engines.trl.trainer import TrlTrainerMixin
from finetune.recipe.errors import Problem
from finetune.training.model import Policy
from finetune.training.preflight.checks import CheckResult, failed

ONLINE_METRIC_NAMES = {
    "reward": "objective/reward",
    "reward_std": "objective/reward_std",
    "entropy": "policy/entropy",
    "completions/mean_length": "val/completion_length",
    "frac_reward_zero_std": "objective/frac_reward_zero_std",
}
"""TRL's metric names -> ours."""
TRUNCATED_FRACTION, KL_PER_TOKEN = "completions/clipped_ratio", "kl"
"""TRL's metric names: fraction of completions without EOS, and KL in nats per token."""
NUM_PROBES = 4
"""Number of prompts, and of completion tokens each, on which reference and policy are compared."""

EvaluateFn = Callable[[KeepGraded | None], dict[str, float]]


class PromptIdTokenizer(PreTrainedTokenizerBase):  # type: ignore[misc]
    """A fake tokenizer for TRL: the text of a prompt is its index, which maps to our encoder's token ids.

    TRL's online trainers tokenize strings themselves, and not every token sequence can be written as a string
    (escaped markers, a truncated prompt, a second BOS).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, eos_token_id: int
    ) -> None:
        """Map prompt indices to token ids.

        Args:
            tokenizer: the policy's tokenizer.
            prompts: token ids; the text of prompt i is ``str(i)``.
            eos_token_id: EOS token id, which is also the pad token: no mask depends on it.
        """
        # PreTrainedTokenizerBase takes tokens, not ids.
        token = str(tokenizer.convert_ids_to_tokens(eos_token_id))
        super().__init__(eos_token=token, pad_token=token, padding_side="left")
        self.tokenizer = tokenizer
        self.prompts = prompts

    def __call__(self, text: Sequence[str], **kwargs: Any) -> dict[str, list[list[int]]]:
        """Return the token ids of prompts, given by index."""
        return {"input_ids": [list(self.prompts[int(index)]) for index in text]}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __repr__(self) -> str:
        # The base class's version needs a vocabulary.
        return f"PromptIdTokenizer({len(self.prompts)} prompts)"

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return self.tokenizer.convert_tokens_to_ids(tokens)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Return empty texts: our rewards use the token ids."""
        return [""] * len(sequences)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Save the policy's tokenizer with a checkpoint."""
        saved: tuple[str, ...] = self.tokenizer.save_pretrained(str(save_directory))
        return saved


class RenameOnlineMetrics(Trainer):  # type: ignore[misc]
    """Renames TRL's metrics to ours; sits between TRL's trainer and Trainer in the MRO."""

    def log(self, logs: dict[str, float | None], start_time: float | None = None) -> None:
        """Log with our metric names; KL in nats per completion; metrics without a value are dropped."""
        renamed = {
            ONLINE_METRIC_NAMES.get(name, name): value for name, value in logs.items() if value is not None
        }
        if TRUNCATED_FRACTION in renamed:
            renamed["val/eos_rate"] = 1 - renamed[TRUNCATED_FRACTION]
        if KL_PER_TOKEN in renamed:
            # TRL logs it per token; ours is per completion, as in PPO.
            renamed["objective/kl_per_completion"] = (
                renamed.pop(KL_PER_TOKEN) * renamed["val/completion_length"]
            )
        super().log(renamed, start_time)


class TRLRewardFunction:
    """Adapts our rewards to TRL's reward function; remembers the locations of the last batch's prompts."""

    def __init__(
        self,
        rewards: Rewards,
        prompts: Prompts,
        encoder: Encoder,
        record: Callable[[list[Entry]], None],
    ) -> None:
        """Bind the rewards; ``record`` receives this process's completions of each step."""
        self.rewards = rewards
        self.prompts = prompts
        self.encoder = encoder
        self.record = record
        self.locations: list[str] = []

    def reward(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None],
        trainer_state: TrainerState,
        **ignored: Any,
    ) -> list[float]:
        """Return the reward of each completion; TRL passes more arguments, which are ignored.

        Raises:
            UserError: a reward function failed on a completion.
            NotFiniteError: a reward is NaN or infinite.
        """
        # The text of a prompt is its index (`PromptIdTokenizer`).
        rows = [self.prompts[int(index)] for index in prompts]
        self.locations = [prompt.location for prompt in rows]
        # Decoded here, as in every other stage; TRL's own texts are empty.
        completions = [self.encoder.decode_reply(ids) for ids in completion_ids]
        conversations = [
            (*prompt.messages, Message("assistant", completion))
            for prompt, completion in zip(rows, completions, strict=True)
        ]
        answers = [prompt.expected for prompt in rows]
        scores = self.rewards.score(conversations, self.locations, expected=answers)
        ended = ends_with_stop_token(completion_ids, self.encoder.stop_ids)
        self.record(rollout_entries(trainer_state.global_step + 1, rows, completions, scores, ended))
        for name, values in scores.by_source.items():
            log_metric(reward_metric_name(name), float(values.mean()))
        total: list[float] = scores.total.tolist()
        return total


def reward_metric_name(name: str) -> str:
    """Return the metric name of a single reward in metrics.jsonl."""
    return f"rewards/{name}"


class OnlineTrainer(TrlTrainerMixin):
    """Builds TRL's trainer on our prompts and rewards; comes before TRL's class in the MRO."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        reward_function: TRLRewardFunction,
        *,
        order: Sequence[int],
        evaluate_held_out: EvaluateFn | None,
    ) -> None:
        """Set up TRL's trainer; its reference is the model as it is now.

        Args:
            model: base with adapter, before its first step.
            args: RLOOConfig or GRPOConfig.
            reward_function: our rewards and prompts, as TRL calls them.
            order: prompt indices of the complete run.
            evaluate_held_out: evaluation between steps, or None.
        """
        encoder = reward_function.encoder
        eos_token_id = int(encoder.tokenizer.eos_token_id)
        prompt_ids = [prompt.ids for prompt in reward_function.prompts]
        dataset = Dataset.from_dict({"prompt": [str(index) for index in order]})
        with progress_bars_disabled(), _with_eos_ids(model, encoder.stop_ids), _restore_weights(model):
            super().__init__(
                model=model,
                reward_funcs=reward_function.reward,
                args=args,
                train_dataset=dataset,
                # A placeholder: TRL needs a dataset to evaluate on, and our evaluate() has its own prompts.
                eval_dataset=None if evaluate_held_out is None else dataset.select([0]),
                processing_class=PromptIdTokenizer(encoder.tokenizer, prompt_ids, eos_token_id=eos_token_id),
            )
        for name, weight in model.named_parameters():
            if f".{REFERENCE_ADAPTER}." in name:
                weight.requires_grad_(False)  # for virtual tokens PEFT leaves the copy trainable
        self.reward_function, self.evaluate_held_out = reward_function, evaluate_held_out

    def row_locations(self, inputs: Any) -> Sequence[str]:
        """Return the locations of the last batch's prompts."""
        return self.reward_function.locations

    def held_out_metrics(self) -> dict[str, float]:
        """Return the metrics of completions to held-out prompts."""
        assert self.evaluate_held_out is not None, "evaluate_every is set with held-out prompts only"
        return self.evaluate_held_out(None)


class OnlineRLOOTrainer(OnlineTrainer, RLOOTrainer, RenameOnlineMetrics):  # type: ignore[misc]
    """TRL's RLOOTrainer with our prompts, rewards, metric names and held-out evaluation."""


class OnlineGRPOTrainer(OnlineTrainer, GRPOTrainer, RenameOnlineMetrics):  # type: ignore[misc]
    """TRL's GRPOTrainer with our prompts, rewards, metric names and held-out evaluation."""


TRAINERS: Mapping[str, type[OnlineTrainer]] = {
    "RLOOConfig": OnlineRLOOTrainer,
    "GRPOConfig": OnlineGRPOTrainer,
}
"""Class name of the arguments -> trainer."""


def prompt_order(
    lengths: Sequence[int], *, count: int, seed: int, group_by_length: bool, prompts_per_step: int
) -> list[int]:
    """Return the prompt order of the run: reshuffled per epoch, ``prompts_per_step`` at a time."""
    # TRL's own shuffle depends on a random state that is in no checkpoint; a fixed order resumes exactly.
    order: list[int] = []
    epoch = 0
    while len(order) < count:
        batches = optimizer_batches(
            lengths, prompts_per_step, seed=seed, epoch=epoch, group_by_length=group_by_length
        )
        order += [row for batch in batches for row in batch]
        epoch += 1
    return order[:count]


@contextmanager
def _with_eos_ids(model: PreTrainedModel, stop_ids: Sequence[int]) -> Iterator[None]:
    """Set the model's EOS ids to our stop tokens while TRL's trainer reads them."""
    # TRL reads its stop tokens here, and adds only the tokenizer's EOS: a template may end turns with others.
    config = model.generation_config
    original = config.eos_token_id
    config.eos_token_id = list(stop_ids)
    try:
        yield
    finally:
        config.eos_token_id = original


@contextmanager
def _restore_weights(model: nn.Module) -> Iterator[None]:
    """Restore the trained weights afterwards: on a 4-bit base TRL casts them to bfloat16."""
    # A cast to bfloat16 and back would round: keep the tensors themselves.
    stored = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in stored:
            weight.data = stored[name]


@contextmanager
def _as_trl_reference(model: nn.Module) -> Iterator[None]:
    """Turn the policy into TRL's reference, as TRL does: by activating its copy of the adapter."""
    assert isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config
    active = model.active_adapter
    # TRL switches adapters and not weights, so its copy is what must be checked.
    model.set_adapter(REFERENCE_ADAPTER)
    try:
        yield
    finally:
        model.set_adapter(active)


def check_trl_reference(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, method: str, beta_key: str
) -> CheckResult:
    """Check that TRL's reference equals the initial policy, including its adapter.

    Args:
        policy: the policy of an online trainer, before its first step.
        prompts: some prompts.
        sampling: sampling parameters.
        seed: sampling seed.
        method: the adapter, for the message.
        beta_key: the recipe's key of the KL coefficient, for the message.
    """
    model = policy.model
    # A few tokens are enough: other weights change the log-probability of every token.
    probes, few_tokens = prompts[:NUM_PROBES], replace(sampling, max_new_tokens=NUM_PROBES)
    stats = score_tokens(
        policy,
        probes,
        sample_completions(model, [prompt.ids for prompt in probes], sampling=few_tokens, seed=seed),
        sampling=few_tokens,
        micro_batch_size=NUM_PROBES,
        as_reference=partial(_as_trl_reference, model),
    )
    difference = float((stats.logps - stats.reference_logps).abs().max())
    if difference > ROUNDING_TOLERANCE[policy.precision]:
        actual = f"with adapter.method '{method}' reference log-probabilities differ by {difference:.2g} nats"
        expected, repair = "a reference equal to the initial policy", f"{beta_key}=0, or adapter.method=lora"
        return failed("start", Problem(beta_key, actual, expected, repair))
    agreement = "exactly" if not difference else f"within {difference:.1g} nats per token"
    return CheckResult("start", f"policy equals reference before step 0 ({agreement})")
